"""`latentplan resume`: a run goes on by its own configuration."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
from tiny import run_config

import latentplan
from latentplan.cli.main import main
from latentplan.config.loading import load_resolved, to_yaml
from latentplan.runs import checkpoint
from latentplan.runs.resuming import config_to_resume
from latentplan.runs.source import RunSource
from latentplan.training.session import train
from latentplan.types import UserError

EXAMPLE = Path(__file__).parents[2] / "examples" / "custom_env.py"


def test_a_moved_run_goes_on(run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(run, moved)
    before = load_resolved(run / "config.yaml")
    with caplog.at_level(logging.INFO, "latentplan"):
        assert main(["resume", str(moved), "steps=320", "log.inspect_every=0"]) == 0
    assert "resuming from frame 256" in caplog.text
    assert checkpoint.load(moved / "checkpoint.pt")["frames"] == 320
    after = load_resolved(moved / "config.yaml")
    assert after.run_dir == str(moved) and after.world == before.world
    assert checkpoint.load(run / "checkpoint.pt")["frames"] == 256


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ("world.deter=32", "world.deter cannot change when a run goes on"),
        ("seed=1", "steps, run_dir, device"),
        ("replay={capacity: 5}", "replay.capacity cannot change"),
        ("stepz=5", "did you mean 'steps'"),
        ("steps=many", "steps must be an integer"),
        ("run_dir=elsewhere", "run_dir"),
        ("config.yaml", "neither a file nor an override"),
    ],
)
def test_only_keys_that_may_change_are_accepted(
    run: Path, capsys: pytest.CaptureFixture[str], item: str, words: str
) -> None:
    assert main(["resume", str(run), item]) == 2
    error = capsys.readouterr().err
    assert words in error and error.startswith("latentplan: ") and error.count("\n") == 1


def test_a_folder_without_a_run_cannot_be_resumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["resume", str(tmp_path / "nowhere")]) == 2
    assert "is not a run folder" in capsys.readouterr().err
    assert not (tmp_path / "nowhere").exists()


def test_a_saved_reference_stays_a_text(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "1")
    shutil.copy(run / "config.yaml", tmp_path / "config.yaml")
    text = (tmp_path / "config.yaml").read_text()
    path = tmp_path / "config.yaml"
    path.write_text(text.replace("module: ''", "module: ${oc.env:SECRET}${seed}"))
    assert load_resolved(path).env.module == "${oc.env:SECRET}${seed}"
    assert config_to_resume(RunSource(tmp_path)).env.module == "${oc.env:SECRET}${seed}"
    path.write_text(text.replace("steps: 256", "steps: ${seed}"))
    with pytest.raises(UserError, match="steps must be an integer"):
        load_resolved(path)


def test_code_of_ones_own_is_trusted_by_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    file = Path(shutil.copy(EXAMPLE, tmp_path / "mine.py"))
    own = ("task=gym:Point-v0", "env.module=mine.py", "env.episode_frames=60", "env.repeat=1")
    run = train(run_config(tmp_path / "run", *own, "eval.every=0", "steps=64", "log.keep=32"))
    evaluate = ["eval", str(run), "--episodes", "1"]
    assert main(evaluate) == 0
    assert main(["resume", str(run), "steps=128"]) == 0
    file.write_text(file.read_text() + "# changed\n")
    assert main(evaluate) == main(["resume", str(run), "steps=192"]) == 2
    error = capsys.readouterr().err
    assert error.count(f"would run the code in {file}") == 2 and "--trust" in error
    assert main([*evaluate, "--trust"]) == 0
    assert main(["resume", str(run), "steps=192", "env.module=mine.py"]) == 0
    assert main(evaluate) == 0  # the session has recorded the present file


def test_every_reader_takes_a_kept_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    every = ("env.repeat=2", "eval.every=64", "steps=192", "log.keep=100", "log.inspect_every=0")
    run = train(run_config(tmp_path / "run", *every))
    kept = json.dumps(sorted(path.stem for path in (run / "checkpoints").iterdir()))
    name = next(x for x in json.loads(kept) if x != "best").removeprefix("frame-")
    for command in (["eval", "--episodes", "1"], ["imagine"], ["export"]):
        capsys.readouterr()
        assert main([command[0], str(run), *command[1:], "--checkpoint", name]) == 0
        assert json.loads(capsys.readouterr().out)["frames"] == int(name)
        assert main([command[0], str(run), *command[1:], "--checkpoint", "best"]) == 0
    for command in ("calibrate", "diagnose"):
        assert main([command, str(run), "--episodes", "2", "--checkpoint", "best"]) == 0
    latentplan.load(run, checkpoint=name)
    capsys.readouterr()
    for wrong in ("7", "../checkpoint", "frame-0"):
        assert main(["eval", str(run), "--checkpoint", wrong]) == 2
        assert "has no checkpoint" in capsys.readouterr().err


def test_sizes_are_refused_before_memory_is_taken(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run, tmp_path / "run")
    text = (run / "config.yaml").read_text()
    assert main(["eval", str(run), "--plan", "candidates=1000000000000"]) == 2
    assert "plan.candidates" in capsys.readouterr().err
    for old, new in (
        ("deter: 16", "deter: 1000000000"),
        ("deter: 16", "deter: 1000000"),
        ("vector_layers: 2", "vector_layers: 1000000000"),
        ("image_size: 16", "image_size: 160000"),
    ):
        assert old in text
        (tmp_path / "run" / "config.yaml").write_text(text.replace(old, new))
        for command in ("eval", "resume"):
            assert main([command, str(tmp_path / "run")]) == 2
            error = capsys.readouterr().err
            assert error.startswith("latentplan: ") and error.count("\n") == 1


def test_a_record_of_sessions_with_wrong_values_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    saved = load_resolved(folder / "config.yaml")
    (folder / "config.yaml").write_text(
        to_yaml(saved).replace("precision: float32", "precision: auto")
    )
    path = folder / "run.json"
    good = json.loads(path.read_text())
    for key, value in (("precision", 7), ("precision", "../x"), ("command", [1]), ("commit", {})):
        session = {**good["sessions"][0], key: value}
        path.write_text(json.dumps({**good, "sessions": [session]}))
        assert main(["resume", str(folder), "steps=320"]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    path.write_text("[" * 100_000)
    assert main(["resume", str(folder), "steps=320"]) == 2
    assert "run.json is damaged" in capsys.readouterr().err
