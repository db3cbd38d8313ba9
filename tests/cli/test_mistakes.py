"""Errors of users: each gives one sentence and exit code 2, and no file of a run changes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from environments import ROOT
from tiny import run_config

from latentplan.cli.main import main
from latentplan.config.loading import to_yaml
from latentplan.inspection.curves import read_curve
from latentplan.runs import checkpoint, resuming, run_folder
from latentplan.training.loop import Trainer
from latentplan.types import UserError

STEPS = 128


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run, ``run``, and its configuration file, ``run.yaml``."""
    home = tmp_path_factory.mktemp("finished")
    assert main(["train", str(write_config(home))]) == 0
    return home


@pytest.fixture
def home(finished: Path, tmp_path: Path) -> Path:
    """A copy of `finished` that a test may change."""
    shutil.copytree(finished / "run", tmp_path / "run")
    write_config(tmp_path)
    return tmp_path


def write_config(home: Path) -> Path:
    config = run_config(home / "run", f"steps={STEPS}", "eval.every=0")
    (home / "run.yaml").write_text(to_yaml(config))
    return home / "run.yaml"


def content(folder: Path) -> dict[str, bytes]:
    """The content of all files except the lock."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def error_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command that fails, and return its error message, which is one sentence."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err
    (sentence,) = [line for line in captured.err.splitlines() if line.startswith("latentplan: ")]
    return sentence


def check_resumes(home: Path) -> None:
    """Check that the run can still be resumed."""
    assert main(["train", str(home / "run.yaml"), f"steps={STEPS + 64}"]) == 0
    assert checkpoint.load(home / "run" / "checkpoint.pt")["frames"] == STEPS + 64


# --- wrong arguments for an existing run ----------------------------------------------------


@pytest.mark.parametrize(
    ("override", "messages"),
    [
        ("task=walker_wlak", ["walker_walk"]),
        ("task=dummy:count", ["run", "task=dummy:pixels", "another run_dir"]),
        ("wrold.deter=3", ["wrold.deter", "world.deter"]),
        ("world.deter=many", ["world.deter", "many"]),
        ("world.deter=32", ["run", "world.deter=16", "32", "another run_dir"]),
        ("seed=1", ["run", "seed=0", "1", "another run_dir"]),
        ("device=cuda:99", ["cuda:99"]),
        ("nothing.yaml", ["nothing.yaml", "No such file"]),
    ],
)
def test_wrong_arguments_do_not_change_a_run(
    home: Path, capsys: pytest.CaptureFixture[str], override: str, messages: list[str]
) -> None:
    before = content(home / "run")
    sentence = error_of(capsys, "train", home / "run.yaml", f"steps={STEPS + 64}", override)
    assert all(text in sentence for text in messages), sentence
    assert content(home / "run") == before


@pytest.mark.parametrize("override", ["seed=0", "seed=1"])
def test_a_run_without_its_checkpoint_does_not_start_again(
    home: Path, capsys: pytest.CaptureFixture[str], override: str
) -> None:
    saved = (home / "run" / "checkpoint.pt").rename(home / "elsewhere.pt")
    before = content(home / "run")
    sentence = error_of(capsys, "train", home / "run.yaml", override)
    assert "another run_dir" in sentence
    assert ("checkpoint is missing" if override == "seed=0" else "seed=0, not 1") in sentence
    assert content(home / "run") == before
    saved.rename(home / "run" / "checkpoint.pt")
    check_resumes(home)


def test_a_run_of_an_earlier_version_without_its_checkpoint_is_an_error(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "run" / "checkpoint.pt").unlink()
    path = home / "run" / "run.json"
    path.write_text(json.dumps({"sessions": json.loads(path.read_text())["sessions"]}))
    assert "checkpoint is missing" in error_of(capsys, "train", home / "run.yaml")


def test_a_run_stopped_before_its_first_checkpoint_starts_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_config(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save", lambda self: None)  # as after a killed process
        assert main(["train", str(file)]) == 0
    assert "seed=0, not 1" in error_of(capsys, "train", file, "seed=1")
    assert main(["train", str(file)]) == 0
    assert checkpoint.load(tmp_path / "run" / "checkpoint.pt")["frames"] == STEPS


def test_a_run_without_its_replay_is_an_error(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "run" / "replay").rename(home / "elsewhere")
    before = content(home / "run")
    sentence = error_of(capsys, "train", home / "run.yaml", f"steps={STEPS + 64}")
    assert "replay is missing" in sentence and "back" in sentence
    assert content(home / "run") == before and not (home / "run" / "replay").exists()
    (home / "elsewhere").rename(home / "run" / "replay")
    check_resumes(home)


def test_an_unknown_task_creates_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    sentence = error_of(capsys, "train", "task=walker_wlak", f"run_dir={tmp_path / 'new'}")
    assert "walker_walk" in sentence
    assert list(tmp_path.iterdir()) == []


# --- damaged files, and files of other runs -------------------------------------------------


@pytest.mark.parametrize("kept", [0.0, 0.5])
@pytest.mark.parametrize("command", ["train", "eval"])
def test_a_damaged_checkpoint_is_an_error(
    home: Path, capsys: pytest.CaptureFixture[str], command: str, kept: float
) -> None:
    path = home / "run" / "checkpoint.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    before = content(home / "run")
    target = home / ("run.yaml" if command == "train" else "run")
    assert "damaged" in error_of(capsys, command, target, *["steps=999"] * (command == "train"))
    assert content(home / "run") == before


@pytest.mark.parametrize("command", ["train", "eval"])
def test_a_checkpoint_of_another_architecture_is_an_error(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    other = run_config(tmp_path / "other", "world.deter=32", "steps=16", "eval.every=0")
    (tmp_path / "other.yaml").write_text(to_yaml(other))
    assert main(["train", str(tmp_path / "other.yaml")]) == 0
    shutil.copy(tmp_path / "other" / "checkpoint.pt", home / "run" / "checkpoint.pt")
    before = content(home / "run")
    target = home / ("run.yaml" if command == "train" else "run")
    sentence = error_of(capsys, command, target, *["steps=999"] * (command == "train"))
    assert "another architecture" in sentence and "(64, 96)" in sentence and "(64, 80)" in sentence
    assert content(home / "run") == before


def test_a_replay_with_other_shapes_is_an_error(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (home / "run").iterdir():
        if path.is_file():
            path.unlink()
    before = content(home / "run")
    sentence = error_of(capsys, "train", home / "run.yaml", "obs=pixels")
    assert "replay" in sentence and "image" in sentence and "(16, 16, 3)" in sentence
    assert content(home / "run") == before


def test_a_damaged_configuration_is_an_error(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "run" / "config.yaml").write_text("world: {deter: [\n")
    before = content(home / "run")
    for command in (["train", home / "run.yaml"], ["eval", home / "run"]):
        assert "config.yaml" in error_of(capsys, *command)
    assert content(home / "run") == before


def test_an_empty_configuration_is_an_error(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "run" / "config.yaml").write_text("")
    before = content(home / "run")
    for command in (["train", home / "run.yaml"], ["eval", home / "run"]):
        sentence = error_of(capsys, *command)
        assert "config.yaml" in sentence and "empty" in sentence
    assert content(home / "run") == before


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"sessions": null}'])
def test_a_damaged_record_of_sessions_is_an_error(
    home: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    (home / "run" / "run.json").write_text(text)
    before = content(home / "run")
    sentence = error_of(capsys, "train", home / "run.yaml", f"steps={STEPS + 64}")
    assert "run.json is damaged" in sentence
    assert content(home / "run") == before
    with pytest.raises(UserError, match=r"run\.json is damaged"):
        read_curve(home / "run")


def test_damaged_metrics_do_not_stop_a_report_or_a_run(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = home / "run" / "metrics.jsonl"
    whole = path.read_bytes()
    scores = read_curve(home / "run").rows
    path.write_bytes(b"\xff\n" + whole + b'{"step": "x"}\n')
    assert read_curve(home / "run").rows == scores
    check_resumes(home)
    (warning,) = (text for text in caplog.messages if "metrics.jsonl" in text)
    assert "lines 1, 4 are damaged" in warning
    assert path.read_bytes().startswith(whole)  # all other rows are kept


@pytest.mark.parametrize("missing", ["", "config.yaml", "checkpoint.pt"])
def test_eval_needs_a_complete_run(
    home: Path, capsys: pytest.CaptureFixture[str], missing: str
) -> None:
    if missing:
        (home / "run" / missing).unlink()
    folder = home / "run" if missing else home / "nowhere"
    assert (missing or "nowhere") in error_of(capsys, "eval", folder)


def test_eval_needs_at_least_one_episode(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "episodes" in error_of(capsys, "eval", home / "run", "--episodes", 0)


@pytest.mark.parametrize("seed", [-1, 2**64])
@pytest.mark.parametrize("command", ["eval", "imagine"])
def test_a_seed_outside_the_accepted_range_is_an_error(
    home: Path, capsys: pytest.CaptureFixture[str], command: str, seed: int
) -> None:
    sentence = error_of(capsys, command, home / "run", f"--seed={seed}")
    assert "seed must be " in sentence and str(seed) in sentence


# --- a full disk ----------------------------------------------------------------------------


def test_a_replay_larger_than_the_disk_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_config(tmp_path)
    sentence = error_of(capsys, "train", file, f"replay.capacity={10**13}")
    assert "replay" in sentence and "replay.capacity=" in sentence and "GB" in sentence
    assert not (tmp_path / "run" / "checkpoint.pt").exists()
    assert main(["train", str(file)]) == 0  # a smaller replay starts in the same folder


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
@pytest.mark.parametrize("name", ["checkpoint.pt", "config.yaml", "run.json"])
def test_a_full_disk_keeps_the_earlier_files(
    home: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    before = content(home / "run")[name]
    open_file = Path.open

    def open_on_full_disk(path: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if path == home / "run" / f"{name}.tmp":
            return open_file(Path("/dev/full"), "wb")
        return open_file(path, mode, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", open_on_full_disk)
        sentence = error_of(capsys, "train", home / "run.yaml", f"steps={STEPS + 64}")
    assert name in sentence and "No space left on device" in sentence
    assert content(home / "run")[name] == before
    check_resumes(home)


def test_a_limit_of_file_size_keeps_the_earlier_files(home: Path) -> None:
    """A limit of the system has the same effect as a full disk, at any write."""
    before = content(home / "run")
    program = (
        "import resource, sys; from latentplan.cli.main import main;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)); sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "train", home / "run.yaml", f"steps={STEPS + 640}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.splitlines()[-1].startswith("latentplan: ")
    assert content(home / "run")["checkpoint.pt"] == before["checkpoint.pt"]
    check_resumes(home)


@pytest.mark.parametrize("name", ["config.yaml", "run.json"])
def test_run_descriptions_are_synced_before_they_replace_earlier_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """After a power cut, the disk has either the earlier file or the new one."""
    synced = []
    fsync, replace = os.fsync, os.replace

    def rename(source: Path, target: Path) -> None:
        assert source.stat().st_ino in synced
        replace(source, target)
        synced.append(target.name)

    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.fstat(fd).st_ino), fsync(fd)))
    monkeypatch.setattr(os, "replace", rename)
    run_folder.record_session(tmp_path, run_config(tmp_path), {})
    assert name in synced


# --- no error -------------------------------------------------------------------------------


def test_other_spellings_name_the_same_task(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run_folder.record_session(folder, run_config(folder, "task=dmc:walker_walk"), {})
    for spelling in ("walker_walk", "walker-walk", "walker/walk"):
        resuming.check_same(folder, run_config(folder, f"task={spelling}", "env.repeat=4"))
    with pytest.raises(UserError, match="task=dmc:walker_walk, not dmc:walker_run"):
        resuming.check_same(folder, run_config(folder, "task=walker_run", "env.repeat=4"))
