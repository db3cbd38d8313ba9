"""Damaged checkpoints are found, and the former checkpoint takes the place of the newest one."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import run_config

from latentplan.cli.main import main
from latentplan.config.loading import to_yaml
from latentplan.runs import checkpoint, run_folder
from latentplan.training.session import train
from latentplan.types import UserError

MARK_BYTES = 20  # the mark and the CRC32 at the end of a checkpoint


def flip(path: Path, bit: int) -> None:
    """Flip one bit of a file."""
    with path.open("r+b") as file:
        file.seek(bit // 8)
        (byte,) = file.read(1)
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def small_checkpoint(path: Path) -> dict[str, Any]:
    payload = {"weights": torch.arange(200.0), "frames": 7, "name": "x" * 50, "pair": (1, 2.5)}
    checkpoint.save(path, payload)
    return payload


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    rest = [{k: v for k, v in x.items() if k != "weights"} for x in (one, other)]
    return rest[0] == rest[1] and torch.equal(one["weights"], other["weights"])


# --- the bytes of one checkpoint ------------------------------------------------------------


def test_a_flipped_bit_anywhere_is_found(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    small_checkpoint(path)
    bits = 8 * path.stat().st_size
    # Every bit of the mark, of the zip file's last record and of the first header, and many others.
    for bit in {*range(300), *range(bits - 400, bits), *range(0, bits, 97)}:
        flip(path, bit)
        with pytest.raises(UserError, match=r"checkpoint\.pt is damaged"):
            checkpoint.load(path)
        flip(path, bit)
    checkpoint.load(path)


def test_a_longer_or_shorter_checkpoint_is_found(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    payload = small_checkpoint(path)
    content = path.read_bytes()
    # Without its mark, the file is whole and looks like one of an earlier version.
    for size in {*range(0, len(content), 13), *range(len(content) - 60, len(content))}:
        path.write_bytes(content[:size])
        if size == len(content) - MARK_BYTES:
            assert same(checkpoint.load(path), payload)
            continue
        with pytest.raises(UserError, match="damaged"):
            checkpoint.load(path)
    for changed in (content + b"\0", content + content, content[:99] + content[100:]):
        path.write_bytes(changed)
        with pytest.raises(UserError, match="damaged"):
            checkpoint.load(path)


def test_a_flipped_bit_in_a_checkpoint_of_an_earlier_version_never_changes_its_content(
    tmp_path: Path,
) -> None:
    """Such a file has no CRC32 of its own, but the zip file has one for each of its members."""
    path = tmp_path / "checkpoint.pt"
    payload = small_checkpoint(path)
    torch.save({"format": checkpoint.FORMAT, "payload": payload}, path)  # as it was saved then
    assert same(checkpoint.load(path), payload)
    bits, refused = 8 * path.stat().st_size, 0
    for bit in range(0, bits, 59):
        flip(path, bit)
        try:
            assert same(checkpoint.load(path), payload)
        except UserError:
            refused += 1
        flip(path, bit)
    assert refused > 100


# --- two generations ------------------------------------------------------------------------


def test_the_former_checkpoint_is_used_if_the_newest_is_damaged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, former = tmp_path / "checkpoint.pt", tmp_path / "checkpoint.1.pt"
    for frames in (1, 2):
        checkpoint.save(path, {"frames": frames})
    assert checkpoint.load_newest(path) == {"frames": 2} and caplog.messages == []
    flip(path, 999)
    assert checkpoint.load_newest(path) == {"frames": 1}
    (warning,) = caplog.messages
    assert f"{path} is damaged" in warning and str(former) in warning
    flip(former, 999)
    with pytest.raises(UserError) as caught:
        checkpoint.load_newest(path)
    assert f"{path} is damaged" in str(caught.value) and str(former) in str(caught.value)


def test_a_damaged_checkpoint_does_not_replace_the_former_one(tmp_path: Path) -> None:
    path, former = tmp_path / "checkpoint.pt", tmp_path / "checkpoint.1.pt"
    for frames in (1, 2):
        checkpoint.save(path, {"frames": frames})
    flip(path, 999)
    checkpoint.save(path, {"frames": 3})
    assert checkpoint.load(path) == {"frames": 3} and checkpoint.load(former) == {"frames": 1}
    checkpoint.save(path, {"frames": 4})
    assert checkpoint.load(former) == {"frames": 3}


def test_errors_that_are_not_damage_do_not_select_the_former_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(UserError, match="There is no checkpoint"):
        checkpoint.load_newest(path)
    for frames in (1, 2):
        checkpoint.save(path, {"frames": frames})
    torch.save({"format": "latentplan-checkpoint-9"}, path)
    with pytest.raises(UserError, match="not a checkpoint of this version"):
        checkpoint.load_newest(path)


@pytest.mark.parametrize("step", range(7))
def test_a_process_killed_at_any_moment_of_saving_leaves_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """The process ends before or after each of: sync, first rename, second rename."""
    path, former = tmp_path / "checkpoint.pt", tmp_path / "checkpoint.1.pt"
    for frames in (1, 2):
        checkpoint.save(path, {"frames": frames})
    moments = iter(range(100))

    class Killed(BaseException):
        pass

    def with_moments(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any) -> Any:
            if next(moments) == step:
                raise Killed
            result = call(*arguments)
            if next(moments) == step:
                raise Killed
            return result

        return wrapped

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda self, missing_ok=False: None)  # it can no longer act
        patch.setattr(os, "fsync", with_moments(os.fsync))
        patch.setattr(os, "replace", with_moments(os.replace))
        with pytest.raises(Killed):
            checkpoint.save(path, {"frames": 3})
    assert checkpoint.load_newest(path) == {"frames": 3 if step >= 5 else 2}
    assert checkpoint.load(former) == {"frames": 2 if step >= 3 else 1}
    checkpoint.save(path, {"frames": 4})
    assert checkpoint.load(path) == {"frames": 4}
    assert checkpoint.load(former)["frames"] in (2, 3)


# --- whole runs -----------------------------------------------------------------------------

SETTINGS = ("eval.every=0", "log.inspect_every=0", "replay.capacity=40")
FULL = (256, 320)  # frames of the two checkpoints: the ring of 40 rows is full at both


@pytest.fixture(scope="module")
def saved_twice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints, whose replay was full at the first one."""
    folder = tmp_path_factory.mktemp("twice") / "run"
    for frames in FULL:
        train(run_config(folder, f"steps={frames}", *SETTINGS))
    return folder


@pytest.fixture
def damaged(saved_twice: Path, tmp_path: Path) -> Path:
    """A copy of ``saved_twice`` whose newest checkpoint is damaged."""
    folder = Path(shutil.copytree(saved_twice, tmp_path / "run"))
    flip(folder / "checkpoint.pt", 50_000)
    return folder


def test_a_run_goes_on_from_the_former_checkpoint(
    damaged: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "latentplan"):
        train(run_config(damaged, "steps=384", *SETTINGS))
    assert f"resuming from frame {FULL[0]}" in caplog.text
    (warning,) = (x.getMessage() for x in caplog.records if x.levelno >= logging.WARNING)
    assert "checkpoint.pt is damaged" in warning and "checkpoint.1.pt" in warning
    assert checkpoint.load(damaged / "checkpoint.pt")["frames"] == 384
    assert checkpoint.load(damaged / "checkpoint.1.pt")["frames"] == FULL[0]


def test_the_replay_of_the_former_checkpoint_has_all_its_rows(
    damaged: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The rows that were written since have overwritten spare rows."""
    saved = checkpoint.load_newest(damaged / "checkpoint.pt")["replay"]["cursor"]
    written = int(np.fromfile(damaged / "replay" / "counters.bin", np.int64)[0])
    assert 0 < written - saved < 40
    with run_folder.open_replay(damaged) as replay:
        assert len(replay) == 40 and replay.state_dict()["cursor"] == saved
    assert all("checkpoint" in message for message in caplog.messages)


def test_commands_use_the_former_checkpoint_or_name_both(
    damaged: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert main(["eval", str(damaged), "--episodes", "1", "--device", "cpu"]) == 0
    assert f'"frames": {FULL[0]}' in capsys.readouterr().out
    assert "checkpoint.pt is damaged" in caplog.text
    flip(damaged / "checkpoint.1.pt", 50_000)
    file = damaged.with_suffix(".yaml")
    file.write_text(to_yaml(run_config(damaged, "steps=384", *SETTINGS)))
    before = {path: path.read_bytes() for path in damaged.rglob("*") if path.is_file()}
    commands = ("imagine", "calibrate", "report", "diagnose", "eval")
    lines = [[command, str(damaged)] for command in commands]
    lines += [["export", str(damaged)], ["train", str(file)]]
    for line in lines:
        assert main(line) == 2, line
        (sentence,) = (
            x for x in capsys.readouterr().err.splitlines() if x.startswith("latentplan: ")
        )
        assert "checkpoint.pt" in sentence and "checkpoint.1.pt" in sentence, sentence
    assert before == {path: path.read_bytes() for path in damaged.rglob("*") if path.is_file()}
