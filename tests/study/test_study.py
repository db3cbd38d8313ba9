from __future__ import annotations

import csv
import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from itertools import combinations
from pathlib import Path

import pytest
from environments import ROOT

from latentplan.cli.main import main
from latentplan.config.loading import flatten, load, preset_folder
from latentplan.inspection.curves import Curve, mean_curve, missing, read_curve
from latentplan.runs import checkpoint, resuming, run_folder
from latentplan.study.matrix import jobs, table
from latentplan.study.study_file import read_study
from latentplan.training.session import train
from latentplan.types import UserError

STUDY = """
tasks: [dummy:pixels]
ablations: [dreamer, optimistic_only]
seeds: [1, 2]
settings: {obs: state, size: tiny, steps: 300, env.workers: false, eval.episodes: 1,
  behavior.target_entropy: null}
parallel: 2
"""
ABLATIONS = sorted(path.stem for path in (preset_folder() / "ablation").glob("*.yaml"))


def write(tmp_path: Path, text: str = STUDY) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(text + f"\nfolder: {tmp_path / 'runs'}\n")
    return path


def test_a_study_has_a_run_per_task_ablation_and_seed(tmp_path: Path) -> None:
    path = write(tmp_path)
    matrix = jobs(read_study(path), path)
    assert [(job.ablation, job.seed) for job in matrix] == [
        ("dreamer", 1),
        ("optimistic_only", 1),
        ("dreamer", 2),
        ("optimistic_only", 2),
    ]
    assert len({job.folder for job in matrix}) == 4 and {job.steps for job in matrix} == {300}
    assert not any(job.done() for job in matrix)


def test_a_study_may_define_variants(tmp_path: Path) -> None:
    text = STUDY.replace("optimistic_only]", "eight]").replace("seeds: [1, 2]", "seeds: [1]")
    variant = "variants: {eight: {ablation: coplanner, plan.candidates: 8}}"
    path = write(tmp_path, text + variant)
    plain, own = jobs(read_study(path), path)
    assert (plain.ablation, own.ablation) == ("dreamer", "eight") and "eight" in own.folder.name
    config = load([], own.overrides)
    assert (config.ablation, config.plan.candidates, config.plan.explore) == ("coplanner", 8, True)
    for wrong in ("variants: {nine: {steps: 3}}", "variants: {eight: {seed: 3}}"):
        path = write(tmp_path, text + wrong)
        with pytest.raises(UserError, match=r"nine|seed"):
            read_study(path)


def test_a_task_may_have_its_own_settings(tmp_path: Path) -> None:
    text = STUDY.replace("[dummy:pixels]", "[dummy:pixels, dummy:count]")
    path = write(tmp_path, text + "per_task: {dummy:count: {steps: 77, env.repeat: 1}}")
    steps = {job.task: job.steps for job in jobs(read_study(path), path)}
    assert steps == {"dummy:pixels": 300, "dummy:count": 77}


def test_the_table_shows_the_progress_of_runs(tmp_path: Path) -> None:
    path = write(tmp_path)
    matrix = jobs(read_study(path), path)
    matrix[0].folder.mkdir(parents=True)
    lines = '{"step": 150, "episode/eval_score": 7.4}\n{"step": 300}\n{"step": 3'
    (matrix[0].folder / "metrics.jsonl").write_text(lines)
    assert not matrix[0].done()  # there is no checkpoint of its last frame
    checkpoint.save(matrix[0].folder / "checkpoint.pt", {"frames": 300})
    assert matrix[0].done()
    text = table(matrix, {matrix[1].folder: "running"})
    assert "done 7" in text and "running 0%" in text and text.count("waiting") == 2


def test_the_table_reads_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path)
    matrix = jobs(read_study(path), path)
    job = matrix[0]
    run_folder.record_session(job.folder, load([], job.overrides), {})
    (job.folder / "metrics.jsonl").write_text('{"step": 300}\n')
    (job.folder / "checkpoint.pt").write_bytes(b"not a checkpoint")
    run_folder.record_checkpoint(job.folder, 200)
    monkeypatch.setattr(checkpoint, "load", None)
    assert not job.done()
    run_folder.record_checkpoint(job.folder, 300)
    assert job.done() and "done" in table(matrix, {})
    (job.folder / "checkpoint.pt").unlink()
    assert not job.done()


def test_many_seeds_are_counted_by_state(tmp_path: Path) -> None:
    path = write(tmp_path, STUDY.replace("seeds: [1, 2]", "seeds: [1, 2, 3, 4, 5, 6, 7]"))
    matrix = jobs(read_study(path), path)
    for job, score in zip(matrix[:2], (10, 20), strict=True):
        job.folder.mkdir(parents=True)
        (job.folder / "metrics.jsonl").write_text(f'{{"step": 9, "episode/eval_score": {score}}}\n')
    first, second = table(matrix, {matrix[1].folder: "running"}).splitlines()
    assert first.startswith("dummy:pixels dreamer") and "6 waiting, 1 begun; mean score 10" in first
    assert "1 running, 6 waiting; mean score 20" in second
    assert matrix[2].progress().frames == 0
    (matrix[0].folder / "metrics.jsonl").write_text('{"step": 100}\n')
    assert matrix[0].progress().frames == 100  # a file that has changed is read again


def test_earlier_names_of_keys_are_read_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = STUDY.replace("optimistic_only]", "eight]").replace(
        "env.workers", "env.count: 2, env.workers"
    )
    text += "per_task: {dummy:pixels: {world.soft_updates: 70, env.count: 3}}\n"
    text += "variants: {eight: {ablation: coplanner, plan.imagine_share: 0.25}}"
    path = write(tmp_path, text)
    for _ in range(2):
        matrix = jobs(read_study(path), path)
    configs = [load([], job.overrides) for job in matrix]
    assert {(x.env.num_envs, x.world.anneal_updates) for x in configs} == {(3, 70)}
    fractions = {x.plan.imagine_fraction for x in configs if x.ablation == "coplanner"}
    assert fractions == {0.25}
    (warning,) = (x for x in caplog.messages if "earlier version" in x)
    assert str(path) in warning and warning.count("env.count is now env.num_envs") == 1
    assert "world.soft_updates is now" in warning and "plan.imagine_share is now" in warning


@pytest.mark.parametrize("action", ["run", "status"])
@pytest.mark.parametrize("option", ["--out", "--also"])
def test_options_of_the_report_are_errors_for_other_actions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], action: str, option: str
) -> None:
    assert main(["study", action, str(write(tmp_path)), option, "x"]) == 2
    assert "study report" in capsys.readouterr().err


@pytest.mark.parametrize("action", ["run", "status", "report"])
def test_a_run_with_other_settings_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], action: str
) -> None:
    path = write(tmp_path)
    first = jobs(read_study(path), path)[0]
    run_folder.record_session(first.folder, load([], first.overrides), {})
    for changed in ("eval.episodes: 2", "eval.episodes: 1, train.threads: 1"):  # the same run
        path = write(tmp_path, STUDY.replace("eval.episodes: 1", changed))
        assert len(jobs(read_study(path), path)) == 4
    path = write(tmp_path, STUDY.replace("size: tiny", "size: tiny, train.batch: 3"))
    assert main(["study", action, str(path)]) == 2
    error = capsys.readouterr().err
    assert first.folder.name in error and "train.batch=" in error and error.count("\n") == 1
    assert [item.name for item in first.folder.parent.iterdir()] == [first.folder.name]


def test_shipped_studies_have_equal_settings_for_shared_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a folder without real runs of these studies
    runs: dict[Path, Path] = {}
    shared = 0
    for path in sorted((preset_folder() / "study").glob("*.yaml")):
        # Other seeds have the same settings.
        for job in jobs(replace(read_study(path), seeds=[1]), path):
            config = load([], job.overrides)
            if job.folder in runs:
                resuming.check_same(runs[job.folder], config)
                shared += 1
            else:
                runs[job.folder] = tmp_path / str(len(runs))
                run_folder.record_session(runs[job.folder], config, {})
    assert shared


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tasks: []", "names no tasks"),
        ("tasks: [a]\nseed: [1]", "seed"),
        ("tasks: [a]\nseeds: [1, 1]", "twice"),
        ("tasks: [a]\nparallel: 0", "parallel"),
        ("tasks: [a]\nsettings: {task: b}", "set by the study"),
        ("tasks: [a]\nsettings: {world.memberss: 2}", "world.members"),
        ("tasks: [a]\nper_task: {b: {steps: 2}}", "none of its tasks"),
        ("tasks: [a]\nper_task: {a: {seed: 2}}", "set by the study"),
        ("tasks: [walker_walk]\nablations: [nothing]", "nothing"),
        ("tasks: [a]\nablations: [mpdp]\nvariants: {mpdp: {steps: 3}}", "has the name of an"),
        ("tasks: [a]\nvariants: {none: {steps: 3}}", "has the name of an"),
        ("tasks: [", "not valid"),
    ],
)
def test_an_invalid_study_starts_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    assert main(["study", "run", str(write(tmp_path, text))]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_a_study_runs_resumes_and_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path)
    command = [sys.executable, "-m", "latentplan", "study", "run", str(path)]

    def run() -> str:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stderr

    assert run().count("done") >= 4
    assert all(job.done() for job in jobs(read_study(path), path))
    assert "running" not in run()  # all runs are done
    longer = write(tmp_path, STUDY.replace("steps: 300", "steps: 400"))
    assert "running" in run()
    matrix = jobs(read_study(longer), longer)
    assert all(job.progress().frames >= 400 for job in matrix)

    pytest.importorskip("matplotlib")
    out = tmp_path / "report" / "small"
    assert main(["study", "report", str(longer), "--out", str(out)]) == 0
    text = capsys.readouterr().out.splitlines()
    final = [read_curve(job.folder).rows[-1]["mean"] for job in matrix if job.ablation == "dreamer"]
    assert len(text) == 8 and f"({final[0]:.0f}, {final[1]:.0f})" in text[2]
    assert "seconds per update" in text[0] and float(text[2].split("|")[9]) > 0
    html = (out.parent / "small.html").read_text()
    assert text[4] in html and "optimistic_only" in html and "data:image/png" in html
    assert out.with_suffix(".png").stat().st_size > 5000
    rows = list(csv.DictReader((out.parent / "small_run_metrics.csv").open()))
    assert len(rows) == 4 and all(int(row["coverage"]) > 1 for row in rows)
    for row in rows:  # only exploration with the planner has this bonus
        assert bool(row["explore_bonus"]) == (row["ablation"] == "optimistic_only")
        assert not row["imagine_bonus"]
        assert 0 < float(row["reward_error"]) < 5 and 0 < float(row["latent_error"]) < 1

    gone = next(job.folder for job in matrix if job.ablation == "dreamer")
    shutil.rmtree(gone)
    again = tmp_path / "again"
    command = ["study", "report", str(longer), "--out", str(again), "--also", str(out)]
    assert main(command) == 0
    table_again = capsys.readouterr().out.splitlines()
    assert table_again[2].split("|")[3] == text[2].split("|")[3]
    assert again.with_suffix(".csv").read_text() == out.with_suffix(".csv").read_text()
    kept = list(csv.DictReader((tmp_path / "again_run_metrics.csv").open()))
    for row, old in zip(kept, rows, strict=True):
        has_folder = row["ablation"] != "dreamer" or row["seed"] != gone.name[-1]
        assert bool(row["coverage"]) == has_folder  # coverage compares the runs of one report
        assert float(row["training"]) == float(old["training"])

    other = write(tmp_path, STUDY.replace("obs: state", "obs: pixels"))
    shutil.rmtree(gone.parent)
    assert main(["study", "report", str(other), "--out", str(again), "--also", str(out)]) == 2
    assert "obs=state" in capsys.readouterr().err


def test_a_report_needs_no_replay(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """One replay has lost its first rows, another is missing. Only their metrics are blank."""
    pytest.importorskip("matplotlib")
    text = STUDY.replace("optimistic_only]", "short]").replace("seeds: [1, 2]", "seeds: [1]")
    path = write(tmp_path, text + "variants: {short: {ablation: dreamer, replay.capacity: 50}}")
    full, short = jobs(read_study(path), path)
    for job in (full, short):
        train(load([], job.overrides))
    out, also = tmp_path / "lr0.1", tmp_path / "lr0.2"  # names with dots that begin no suffix
    assert main(["study", "report", str(path), "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8 and "never" not in lines[3]
    (warning,) = (x for x in caplog.messages if "no metrics of" in x)
    assert short.folder.name in warning and "no longer has" in warning
    assert (tmp_path / "lr0.1.png").exists() and (tmp_path / "lr0.1.json").exists()
    runs = {row["run"]: row["ablation"] for row in csv.DictReader((tmp_path / "lr0.1.csv").open())}
    assert runs == {full.folder.name: "dreamer", short.folder.name: "short"}
    described = json.loads((tmp_path / "lr0.1.json").read_text())
    assert [run["ablation"] for run in described] == ["dreamer", "short"]
    rows = list(csv.reader((tmp_path / "lr0.1_run_metrics.csv").open()))
    assert all(rows[1][4:6]) and rows[2] == ["dummy:pixels", "short", "1", *[""] * 10]

    saved = checkpoint.load(full.folder / "checkpoint.pt")
    del saved["agent"]["actor.net.output.bias"]
    checkpoint.save(full.folder / "checkpoint.pt", saved)
    assert main(["study", "report", str(path), "--out", str(also)]) == 0
    (warning,) = (x for x in caplog.messages if "no errors of" in x)
    assert full.folder.name in warning and "another architecture" in warning
    (older, *_) = list(csv.reader((tmp_path / "lr0.2_run_metrics.csv").open()))[1:]
    assert older == [*rows[1][:5], *[""] * 4, *rows[1][9:]]

    shutil.rmtree(full.folder / "replay")
    assert main(["study", "report", str(path), "--out", str(also)]) == 0
    assert caplog.text.count("no metrics of") == 4
    assert (tmp_path / "lr0.2.csv").read_text() == (tmp_path / "lr0.1.csv").read_text()

    shutil.rmtree(full.folder.parent)  # both results are read from the earlier report
    assert main(["study", "report", str(path), "--out", str(also), "--also", str(out)]) == 0
    assert (tmp_path / "lr0.2.csv").read_text() == (tmp_path / "lr0.1.csv").read_text()


def test_a_stopped_study_saves_its_runs(tmp_path: Path) -> None:
    path = write(tmp_path, STUDY.replace("steps: 300", "steps: 1000000, log.every: 64"))
    command = [sys.executable, "-m", "latentplan", "study", "run", str(path)]
    # A script that starts the study in the background starts it with SIGINT ignored.
    ignore = lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)  # noqa: E731
    with subprocess.Popen(command, cwd=ROOT, preexec_fn=ignore, stderr=subprocess.DEVNULL) as study:
        first = jobs(read_study(path), path)[0].folder
        for _ in range(600):
            if (first / "metrics.jsonl").exists() and (first / "metrics.jsonl").stat().st_size:
                break
            time.sleep(0.2)
        study.send_signal(signal.SIGINT)
        assert study.wait(120) != 0
    assert (first / "checkpoint.pt").is_file()
    assert "saved in" in first.with_name(first.name + ".log").read_text()


def test_a_report_needs_an_evaluated_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["study", "report", str(write(tmp_path)), "--out", str(tmp_path / "x")]) == 2
    assert "No run" in capsys.readouterr().err


def test_a_mean_curve_has_the_frames_common_to_all_runs() -> None:
    curves = [
        Curve({}, [{"frame": f, "mean": m} for f, m in points])
        for points in ([(10, 1.0), (20, 2.0), (25, 9.0)], [(10, 3.0), (20, 6.0)])
    ]
    assert mean_curve(curves) == ([10, 20], [2.0, 4.0])


def test_a_mean_curve_survives_uneven_evaluations() -> None:
    points = {"a": [(10, 1.0), (20, 3.0), (40, 7.0)], "b": [(15, 0.0), (35, 20.0)], "c": []}
    curves = [
        Curve({"run": name}, [{"frame": f, "mean": m} for f, m in rows])
        for name, rows in points.items()
    ]
    frames, means = mean_curve(curves)
    assert frames == [15, 20, 35]
    assert means == pytest.approx([(2 + 0) / 2, (3 + 5) / 2, (6 + 20) / 2])
    apart = Curve({"run": "d"}, [{"frame": 50, "mean": 1.0}])
    assert mean_curve([curves[0], apart]) == ([], [])
    assert missing({"walk": {"dreamer": curves[:2]}}) == []
    sentences = missing({"walk": {"dreamer": curves, "mpdp": [curves[0], apart]}})
    assert [sentence.split()[:3] for sentence in sentences] == [
        ["c", "is", "not"],
        ["walk,", "mpdp", "has"],
    ]


def test_a_failed_run_is_named_in_the_log(tmp_path: Path) -> None:
    text = STUDY.replace("dummy:pixels", "gym:Nowhere-v0").replace("[1, 2]", "[1]")
    path = write(tmp_path, text)
    done = subprocess.run(
        [sys.executable, "-m", "latentplan", "study", "run", str(path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )
    assert done.returncode == 1 and "failed" in done.stderr and ".log" in done.stderr


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_ablation_changes_something(name: str) -> None:
    plain, changed = (flatten(asdict(load([], x))) for x in ([], [f"ablation={name}"]))
    different = {key for key in plain if plain[key] != changed[key]} - {"ablation", "run_dir"}
    assert different or name == "dreamer"


def test_no_two_ablations_are_the_same() -> None:
    def settings(name: str) -> dict[str, object]:
        flat = flatten(asdict(load([], [f"ablation={name}"])))
        return {key: x for key, x in flat.items() if key not in ("ablation", "run_dir")}

    resolved = {name: settings(name) for name in ABLATIONS}
    assert [(a, b) for a, b in combinations(ABLATIONS, 2) if resolved[a] == resolved[b]] == []
