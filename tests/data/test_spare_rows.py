"""A full replay returns to its rows at a checkpoint, because newer rows overwrite spare ones."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from test_replay import SPEC, fill, windows

from latentplan.data.replay import SPARE_ROWS_MIN, Replay

ENVS, ROWS = 2, 30


def opened(folder: Path) -> Replay:
    return Replay(folder, SPEC, capacity=ROWS * ENVS, envs=ENVS)


def killed(replay: Replay) -> None:
    """Unlock the folder, as at the end of a process."""
    replay._files._lock.release()


def test_rows_after_a_checkpoint_overwrite_spare_rows(tmp_path: Path) -> None:
    replay = opened(tmp_path)
    fill(replay, range(100), ENVS)
    replay.flush()
    state, before = replay.state_dict(), windows(replay, 4)
    fill(replay, range(100, 100 + ROWS), ENVS)
    assert replay.spare_used == 1
    killed(replay)
    replay = opened(tmp_path)
    replay.load_state_dict(state)
    assert len(replay) == ENVS * ROWS
    assert windows(replay, 4) == before


def test_more_rows_than_spare_ones_cost_the_oldest(tmp_path: Path) -> None:
    replay = opened(tmp_path)
    fill(replay, range(100), ENVS)
    replay.flush()
    state = replay.state_dict()
    fill(replay, range(100, 100 + ROWS + 3), ENVS)
    assert replay.spare_used > 1
    killed(replay)
    replay = opened(tmp_path)
    replay.load_state_dict(state)
    assert len(replay) == ENVS * (ROWS - 3)


def test_spare_rows_are_used_from_the_first_overwritten_row_on(tmp_path: Path) -> None:
    replay = opened(tmp_path)
    fill(replay, range(2 * ROWS), ENVS)
    assert replay.spare_used == 0
    fill(replay, range(2 * ROWS, 2 * ROWS + 1), ENVS)
    assert replay.spare_used > 1, "nothing has been flushed yet"
    replay.flush()
    assert replay.spare_used == 0


def test_a_large_replay_has_a_sixteenth_of_spare_rows(tmp_path: Path) -> None:
    row = Replay.size_bytes(SPEC, 1, 1) / 2
    for capacity, spare in ((500, 500), (4000, SPARE_ROWS_MIN), (160_000, 10_000)):
        assert Replay.size_bytes(SPEC, capacity, 1) == (capacity + spare) * row


def test_a_folder_without_spare_rows_opens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("latentplan.data.replay._spare_rows", lambda rows: 0)
        replay = opened(tmp_path)
    fill(replay, range(100), ENVS)
    before, state = windows(replay, 4), replay.state_dict()
    replay.close()
    path = tmp_path / "replay.json"
    meta = json.loads(path.read_text())
    del meta["spare"]
    path.write_text(json.dumps({**meta, "format": 2}))
    replay = opened(tmp_path)
    replay.load_state_dict(state)
    assert windows(replay, 4) == before and not caplog.messages
    fill(replay, range(100, 105), ENVS)
    assert replay.spare_used == 0
    assert len(replay) == ENVS * ROWS


@pytest.mark.parametrize("field", ["reward", "obs.vector", "prev_action"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_rows_that_are_not_finite_are_left_out_when_opened(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, field: str, value: float
) -> None:
    """Versions before this one stored what an environment returned."""
    replay = opened(tmp_path)
    fill(replay, range(20), ENVS)
    replay._rings[field][1, 7] = value
    state = replay.state_dict()
    replay.close()  # the checksum is that of the row with the value
    replay = opened(tmp_path)
    replay.load_state_dict(state)
    (message,) = caplog.messages
    assert "environment 1: rows 7;" in message
    assert windows(replay, 4) == {
        (env, start)
        for env in range(ENVS)
        for start in range(17)
        if not (env == 1 and start <= 7 < start + 4)
    }
