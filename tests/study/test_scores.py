"""The forms of ``latentplan scores``, read as the scripts that define them read them."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest
from tiny import write_run

from latentplan.cli.main import main
from latentplan.study.scores import scores
from latentplan.types import UserError

ROWS: list[dict[str, Any]] = [
    {"step": 1000, "episode/score": 10.5},
    {"step": 2000, "episode/score": 20.5, "episode/eval_score": 30.0, "episode/sample_score": 25.0},
    {"step": 3000},
    {"step": 4000, "episode/score": None, "episode/eval_score": 41.234567},
]


def test_dreamerv3_is_a_list_of_records_of_training_episodes(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "a", ROWS, "task=cup_catch", "seed=1", "env.repeat=2"),
        write_run(tmp_path / "b", ROWS[:2], "task=walker_walk", "ablation=coplanner"),
    ]
    for name, read in (("all.json", Path.read_bytes), ("all.json.gz", _unzip)):
        out = tmp_path / "new" / name
        assert scores(runs, "dreamerv3", out) == str(out)
        one, other = json.loads(read(out))
        assert one == {
            "task": "dmc_cup_catch",
            "method": "latentplan",
            "seed": "1",
            "xs": [1000, 2000],  # environment frames, whatever the action repeat is
            "ys": [10.5, 20.5],
        }
        assert (other["task"], other["method"]) == ("dmc_walker_walk", "coplanner")
    assert json.loads(scores(runs, "dreamerv3", None)) == [one, other]
    chosen = json.loads(scores(runs, "dreamerv3", None, metric="eval", method="mine"))
    assert chosen[0]["xs"] == [2000, 4000] and {x["method"] for x in chosen} == {"mine"}


def _unzip(path: Path) -> bytes:
    return gzip.decompress(path.read_bytes())


def test_dreamerv3_in_a_folder_is_what_its_plot_script_finds(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", ROWS, "task=gym:Some/Point-v0", "ablation=coplanner", "seed=7")
    scores([run], "dreamerv3", tmp_path / "logs")
    (path,) = (tmp_path / "logs").glob("**/scores.jsonl")
    _, task, method, seed = path.parent.name.split("-")
    assert (task, method, seed) == ("gym_Some_Point_v0", "coplanner", "7")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [
        {"step": 1000, "episode/score": 10.5},
        {"step": 2000, "episode/score": 20.5},
    ]


def test_tdmpc2_is_a_table_of_evaluations_per_task(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "a", ROWS, "task=cartpole_swingup", "seed=1"),
        write_run(tmp_path / "b", ROWS, "task=cartpole_swingup", "seed=2"),
        write_run(tmp_path / "c", ROWS, "task=cup_catch", "seed=1"),
    ]
    expected = "step,reward,seed\n2000,30,1\n4000,41.2346,1\n"
    assert scores(runs[:1], "tdmpc2", None) == expected
    assert scores(runs[:1], "tdmpc2", tmp_path / "x.csv") == str(tmp_path / "x.csv")
    assert (tmp_path / "x.csv").read_text() == expected
    scores(runs, "tdmpc2", tmp_path / "results")
    names = {path.name: path.read_text() for path in (tmp_path / "results").iterdir()}
    assert names.keys() == {"cartpole-swingup.csv", "cup-catch.csv"}
    assert names["cartpole-swingup.csv"] == expected + "2000,30,2\n4000,41.2346,2\n"
    for out in (None, tmp_path / "one.csv"):
        with pytest.raises(UserError, match=r"several tasks.*--out FOLDER"):
            scores(runs, "tdmpc2", out)


def test_csv_has_every_return(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", ROWS, "task=walker_walk", "seed=3", "env.repeat=2")
    rows = list(csv.DictReader(io.StringIO(scores([run], "csv", None))))
    assert [row["frame"] for row in rows] == ["1000", "2000", "4000"]
    assert {(row["run"], row["task"], row["seed"], row["repeat"]) for row in rows} == {
        ("a", "walker_walk", "3", "2")
    }
    assert [rows[1][x] for x in ("train", "eval", "sample", "planner")] == [
        "20.5",
        "30.0",
        "25.0",
        "",
    ]
    assert (rows[2]["train"], rows[2]["seconds"]) == ("", "400.0")
    with pytest.raises(UserError, match="--metric and --method"):
        scores([run], "csv", None, metric="eval")


@pytest.mark.parametrize(("form", "metric"), [("tdmpc2", ""), ("dreamerv3", "eval"), ("csv", "")])
def test_a_run_without_evaluation_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, form: str, metric: str
) -> None:
    good = write_run(tmp_path / "good", ROWS, "task=walker_walk", "seed=1")
    none = write_run(tmp_path / "none", [{"step": 100, "episode/score": 1.0}], "task=walker_walk")
    text = scores([good, none], form, None, metric=metric)
    (warning,) = caplog.messages
    assert str(none) in warning and "no evaluation yet" in warning
    assert ("none" in text) == (form == "csv")  # the table has its training episodes


def test_runs_without_any_return_are_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(write_run(tmp_path / "empty", [{"step": 100}], "task=walker_walk"))
    for form, absent in (
        ("tdmpc2", "there is no evaluation yet"),
        ("dreamerv3", "there is no finished training episode yet"),
        ("csv", "there is neither an evaluation nor a finished training episode yet"),
    ):
        assert main(["scores", run, "--format", form]) == 2
        assert capsys.readouterr().err == f"latentplan: {run}: {absent}.\n"
    assert main(["scores", str(tmp_path), "--format", "csv"]) == 2
    assert "not a run folder" in capsys.readouterr().err


def test_runs_that_a_format_cannot_tell_apart_are_an_error(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", ROWS, "task=walker_walk", "ablation=coplanner")
    two = write_run(
        tmp_path / "two", ROWS, "task=walker_walk", "ablation=coplanner", "plan.candidates=8"
    )
    other = write_run(tmp_path / "other", ROWS, "task=walker_walk", "ablation=dreamer", "seed=1")
    for form in ("dreamerv3", "tdmpc2"):
        with pytest.raises(UserError, match=r"one and .*two have the same task, method and seed"):
            scores([one, two], form, None)
        assert scores([one, one], form, None) == scores([one], form, None)
    with pytest.raises(UserError, match="one method, but the runs have coplanner, dreamer"):
        scores([one, other], "tdmpc2", None)
    assert scores([one, other], "tdmpc2", None, method="mine").count("\n") == 5


def test_no_code_of_a_run_folder_runs_and_no_name_leaves_the_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = tmp_path / "code.py"
    module.write_text("raise SystemExit('this file was run')\n")
    task = "task=gym:../../outside"
    run = write_run(tmp_path / "a", ROWS, task, f"env.module={module}")
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("ablation: none", "ablation: ../../up"))
    for form in ("dreamerv3", "tdmpc2"):
        out = tmp_path / "deep" / "er" / form
        assert main(["scores", str(run), "--format", form, "--out", str(out)]) == 0
        (written,) = (path for path in (tmp_path / "deep").rglob("*") if path.is_file())
        assert out in written.parents and str(written) == capsys.readouterr().out.strip()
        written.unlink()


def test_a_file_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", ROWS, "task=walker_walk")
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "x.json", tmp_path / "file" / "x.json.gz"):
        with pytest.raises(UserError, match="cannot be written"):
            scores([run], "dreamerv3", out)
