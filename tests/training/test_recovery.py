"""Losses that are not finite, the lock of the run folder, and the estimate of memory."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import run_config

from latentplan.agent import Agent
from latentplan.data.replay import Replay
from latentplan.runs import checkpoint
from latentplan.runtime import disk
from latentplan.training.session import train
from latentplan.types import UserError

SampleNan = Callable[[Callable[[int], bool]], None]


@pytest.fixture
def sample_nan(monkeypatch: pytest.MonkeyPatch) -> SampleNan:
    """A function that puts a NaN into those batches whose number is chosen."""

    def install(chosen: Callable[[int], bool]) -> None:
        count = 0

        def sample(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            batch, episode = original(*arguments, **options)
            if chosen(count):
                batch.reward[0, 1] = np.nan
            count += 1
            return batch, episode

        original = Replay.sample
        monkeypatch.setattr(Replay, "sample", sample)

    return install


def test_a_batch_with_a_value_that_is_not_finite_is_skipped(
    tmp_path: Path, sample_nan: SampleNan, caplog: pytest.LogCaptureFixture
) -> None:
    sample_nan(lambda number: number in (2, 5, 6))
    train(run_config(tmp_path / "run"))
    saved = checkpoint.load(tmp_path / "run" / "checkpoint.pt")
    assert saved["frames"] == 256
    warnings = [x for x in caplog.messages if "The batch is skipped." in x]
    assert len(warnings) == 3 and all("not finite" in x and "rew" in x for x in warnings)
    assert all(x.isfinite().all() for x in saved["agent"].values())
    assert not list((tmp_path / "run").glob("nonfinite-*"))


def test_skipped_batches_are_counted_over_all_sessions(
    tmp_path: Path, sample_nan: SampleNan
) -> None:
    sample_nan(lambda number: number in (2, 5))
    rows: list[dict[str, float]] = []
    train(run_config(tmp_path / "run", "steps=128"), on_log=rows.append)
    sample_nan(lambda number: number == 1)
    train(run_config(tmp_path / "run", "steps=256"), on_log=rows.append)
    counts = [row["train/skipped_batches"] for row in rows]
    assert counts == sorted(counts) and counts[-1] == 3
    assert checkpoint.load(tmp_path / "run" / "checkpoint.pt")["skipped_batches"] == 3


def test_bad_batches_in_a_row_bring_the_agent_back_to_the_newest_checkpoint(
    tmp_path: Path,
    sample_nan: SampleNan,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The weights after the return are those of the checkpoint; experience and counters go on."""
    folder = tmp_path / "run"
    train(run_config(folder, "steps=128"))
    before = checkpoint.load(folder / "checkpoint.pt")
    loaded: list[dict[str, Any]] = []
    restore = Agent.load_state_dict

    def record(self: Agent, state: dict[str, Any], *arguments: Any, **options: Any) -> Any:
        loaded.append({name: x.clone() for name, x in state.items()})
        return restore(self, state, *arguments, **options)

    monkeypatch.setattr(Agent, "load_state_dict", record)
    sample_nan(lambda number: number in (3, 4, 5))
    train(run_config(folder, "steps=256", "log.checkpoint_seconds=0"))
    assert f"The agent returns to {folder / 'checkpoint.pt'}, of frame 128." in caplog.messages
    assert len(loaded) == 2  # at the start, and after the bad batches
    assert all(torch.equal(x, before["agent"][name]) for name, x in loaded[1].items())
    assert checkpoint.load(folder / "checkpoint.pt")["frames"] == 256


def test_a_session_ends_when_no_checkpoint_helps(
    tmp_path: Path, sample_nan: SampleNan, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    train(run_config(folder, "steps=128"))
    train(run_config(folder, "steps=192"))
    before = (folder / "checkpoint.pt").read_bytes()
    sample_nan(lambda number: True)
    with pytest.raises(UserError, match=r"not finite: .*rew.*3 times in a row") as caught:
        train(run_config(folder, "steps=512", "log.checkpoint_seconds=1"))
    (dump,) = folder.glob("nonfinite-*.npz")
    assert dump.name in str(caught.value)
    assert np.isnan(np.load(dump)["reward"][0, 1])
    assert (folder / "checkpoint.pt").read_bytes() == before
    returns = [x for x in caplog.messages if "The agent returns to" in x]
    assert [name in x for name, x in zip(("t.pt", "t.1.pt"), returns, strict=True)] == [True] * 2


# --- the lock -------------------------------------------------------------------------------


def test_a_folder_in_use_is_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    train(run_config(folder, "steps=64"))

    def refuse(path: Path) -> Any:
        raise AssertionError(f"{path} was read")

    monkeypatch.setattr(checkpoint, "load_newest", refuse)
    with (
        disk.locked(folder),
        pytest.raises(UserError, match=r"Another process is training in .*run"),
    ):
        train(run_config(folder, "steps=128"))


def test_a_refused_run_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="device"):
        train(run_config(tmp_path / "a" / "run", "device=cuda:77"))
    assert not (tmp_path / "a" / "run").exists()


def test_a_folder_that_is_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(UserError, match="run cannot be written"):
        train(run_config(tmp_path / "run"))


# --- checkpoints that the replay needs ------------------------------------------------------


def test_a_checkpoint_is_written_before_the_spare_rows_are_used_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run has no time for a scheduled checkpoint, and its replay is full after 60 rows."""
    used: list[float] = []
    save = checkpoint.save

    def record(path: Path, payload: dict[str, Any], **options: bool) -> None:
        if "replay" in payload:
            used.append(payload["replay"]["cursor"])
        save(path, payload, **options)

    monkeypatch.setattr(checkpoint, "save", record)
    train(run_config(tmp_path / "run", "steps=1024", "replay.capacity=60"))
    full = [cursor for cursor in used if cursor > 120]
    assert full[0] <= 120 + 17 + 54  # at an episode's end, else at nine tenths of the spare rows
    assert max(np.diff(full)) <= 54


# --- memory ---------------------------------------------------------------------------------


def test_the_estimate_of_memory_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "latentplan")
    train(run_config(tmp_path / "run", "steps=64"))
    (line,) = [x for x in caplog.messages if x.startswith("memory: at least")]
    assert "for the agent and its optimizer" in line and "cpu has" in line
    assert any(x.startswith("replay: 1,000 rows, ") for x in caplog.messages)


def test_a_run_that_cannot_fit_is_refused_with_the_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("latentplan.training.memory.total_memory", lambda device: 200_000)
    with pytest.raises(UserError, match=r"needs at least .* MB .* but cpu has 0\.2 MB: use"):
        train(run_config(tmp_path / "run"))
    assert not (tmp_path / "run" / "checkpoint.pt").exists()
