"""Damaged, torn and future rows of a replay are found when it is opened, and never sampled."""

from __future__ import annotations

import json
import logging
import os
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
from test_replay import SPEC, fill, make_row, windows

from latentplan.data.checksums import DamagedRows, row_checksums
from latentplan.data.replay import Replay
from latentplan.types import UserError

ENVS, ROWS, LENGTH = 2, 30, 4
PAGE = 4096  # bytes that the system writes to the disk at once
pytestmark = pytest.mark.usefixtures("without_spare_rows")


def opened(folder: Path, state: dict[str, int], envs: int = ENVS, rows: int = ROWS) -> Replay:
    """The replay in its state at a checkpoint."""
    replay = Replay(folder, SPEC, capacity=rows * envs, envs=envs)
    replay.load_state_dict(state)
    return replay


def written(folder: Path, steps: int = 50) -> dict[str, int]:
    """Write a replay with ``steps`` rows per environment. Returns its state."""
    replay = Replay(folder, SPEC, capacity=ROWS * ENVS, envs=ENVS)
    fill(replay, range(steps), ENVS)
    replay.close()
    return replay.state_dict()


def flip(path: Path, bit: int) -> None:
    """Flip one bit of a file."""
    content = np.fromfile(path, np.uint8)
    content[bit // 8] ^= 1 << bit % 8
    content.tofile(path)


def expected(damaged: set[tuple[int, int]], first: int, end: int) -> set[tuple[int, int]]:
    """All windows (environment, start) of LENGTH rows without a damaged (environment, row)."""
    return {
        (env, start)
        for env in range(ENVS)
        for start in range(first, end - LENGTH + 1)
        if not damaged & {(env, row) for row in range(start, start + LENGTH)}
    }


def test_a_checksum_is_the_crc32_of_the_fields_and_the_number() -> None:
    rng = np.random.default_rng(0)
    image, reward = rng.integers(256, size=(3, 2, 5), dtype=np.uint8), rng.random(3)
    first = np.array([False, True, False])
    rows = np.array([7, 8, 2**32 + 9])
    sums = row_checksums([image, reward, first], rows)
    assert sums.dtype == np.uint32
    for i, start in enumerate((7, 8, 9)):
        content = image[i].tobytes() + reward[i].tobytes() + first[i].tobytes()
        assert sums[i] == zlib.crc32(content, start)


@pytest.mark.parametrize(
    "name",
    [
        *("obs.image", "obs.vector", "prev_action", "reward"),
        *("is_first", "is_terminal", "episode", "checksums"),
    ],
)
def test_a_flipped_bit_is_reported_and_its_row_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    state = written(tmp_path)
    path, rng = tmp_path / f"{name}.bin", np.random.default_rng(0)
    bits = 8 * path.stat().st_size
    for bit in (0, bits - 1, *rng.integers(bits, size=4).tolist()):
        caplog.clear()
        flip(path, bit)
        env, slot = divmod(bit * ENVS * ROWS // bits, ROWS)
        row = next(row for row in range(20, 50) if row % ROWS == slot)
        replay = opened(tmp_path, state)
        (warning,) = caplog.messages
        assert "damaged" in warning and f"environment {env}: rows {row}; 1 in all" in warning
        assert windows(replay, LENGTH, 2000) == expected({(env, row)}, 20, 50)
        assert len(replay) == ENVS * ROWS - 1
        with pytest.raises(UserError, match="no longer has the run's first"):
            replay.history()
        replay.close()
        flip(path, bit)
    caplog.clear()
    opened(tmp_path, state)
    assert caplog.messages == []


def test_a_damaged_row_is_left_out_until_it_is_overwritten(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = written(tmp_path)
    flip(tmp_path / "reward.bin", 8 * 4 * (40 % ROWS))
    for _ in range(2):  # closing gives the row no new checksum
        replay = opened(tmp_path, state)
        assert windows(replay, LENGTH, 2000) == expected({(0, 40)}, 20, 50)
        replay.close()
    replay = opened(tmp_path, state)
    for end in range(51, 75):
        fill(replay, range(end - 1, end), ENVS)
        if end % 7 == 0:  # new rows get their checksums
            replay.close()
            replay = opened(tmp_path, replay.state_dict())
        assert windows(replay, LENGTH, 2000) == expected({(0, 40)}, end - ROWS, end)
    replay.close()
    caplog.clear()
    replay = opened(tmp_path, replay.state_dict())
    assert len(replay) == ENVS * ROWS and caplog.messages == []


def test_windows_between_damaged_rows_are_drawn_uniformly() -> None:
    damaged = DamagedRows([np.array([3, 4, 11, 30]), np.array([9]), np.array([], np.int64)])
    assert str(damaged) == "environment 0: rows 3 to 4, 11, 30; environment 1: rows 9"
    assert damaged.last == 30 and damaged.count(0) == 5 and damaged.count(9) == 3
    rows = [{3, 4, 11, 30}, {9}, set()]
    valid = [
        (env, start)
        for env in range(3)
        for start in range(4, 35 - 3)
        if not rows[env] & set(range(start, start + 4))
    ]
    assert damaged.windows(4, 4, 35)[2].sum() == len(valid)
    env, start = damaged.draw(400 * len(valid), 4, 4, 35, np.random.default_rng(0))
    assert env.shape == start.shape == (400 * len(valid), 1)
    drawn, counts = np.unique(np.hstack([env, start]), axis=0, return_counts=True)
    assert [tuple(x) for x in drawn.tolist()] == valid
    assert counts.min() > 300 and counts.max() < 500  # 400 +- 20


def test_windows_of_an_intact_replay_are_drawn_as_in_earlier_versions(tmp_path: Path) -> None:
    replay = opened(tmp_path, written(tmp_path))
    rows, _ = replay.sample(16, LENGTH, np.random.default_rng(5))
    rng = np.random.default_rng(5)
    env = rng.integers(ENVS, size=(16, 1))
    start = rng.integers(20, 50 - LENGTH + 1, size=(16, 1))
    np.testing.assert_array_equal(rows.reward, 1000 * env + start + np.arange(LENGTH))


def test_a_replay_without_a_whole_window_waits_for_new_rows(tmp_path: Path) -> None:
    state = written(tmp_path, 12)
    sums = np.fromfile(tmp_path / "checksums.bin", np.uint32)
    sums[::3] += 1
    sums.tofile(tmp_path / "checksums.bin")
    replay = opened(tmp_path, state)
    assert len(replay) == 16 and replay.ready(2) and not replay.ready(3)
    with pytest.raises(ValueError, match="no window of 3 rows among 16"):
        replay.sample(1, 3, np.random.default_rng(0))
    with pytest.raises(UserError, match=r"history is incomplete \(environment 0: rows 0, 3, 6, 9;"):
        replay.history()
    fill(replay, range(12, 13), ENVS)
    assert windows(replay, 3) == {(0, 10), (1, 10)}


# --- the counters ---------------------------------------------------------------------------


def test_damaged_counters_are_taken_from_the_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """After a flip, the same windows are drawn. A flip of a lowest bit may cost one row."""
    state = written(tmp_path)
    path = tmp_path / "counters.bin"
    good = path.read_bytes()
    for bit in range(0, 8 * len(good), 2):
        caplog.clear()
        flip(path, bit)
        replay = opened(tmp_path, state)
        reported = [x for x in caplog.messages if "counters" in x and "are damaged" in x]
        assert len(reported) == len(caplog.messages) <= 1
        assert reported or bit % 64 == 0
        assert len(replay) >= ENVS * (ROWS - (not reported))
        if bit % 16 == 0:
            first = 50 - len(replay) // ENVS
            assert windows(replay, LENGTH, 2000) == expected(set(), first, 50)
        replay.close()
        assert reported == [] or path.read_bytes() == good  # it is mended
        path.write_bytes(good)


def test_counters_of_zeros_are_taken_from_the_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A power cut can leave a page of zeros."""
    state = written(tmp_path)
    (tmp_path / "counters.bin").write_bytes(bytes((tmp_path / "counters.bin").stat().st_size))
    assert len(opened(tmp_path, state)) == ENVS * ROWS
    assert "are damaged and are taken from the checkpoint" in caplog.text


def test_rows_that_were_overwritten_are_found_without_the_counters(tmp_path: Path) -> None:
    state = written(tmp_path)
    replay = opened(tmp_path, state)
    fill(replay, range(50, 57), ENVS)
    replay._files._lock.release()  # as at the end of a process
    flip(tmp_path / "counters.bin", 70)
    replay = opened(tmp_path, state)
    assert windows(replay, LENGTH, 2000) == expected(set(), 27, 50)


def test_closing_a_replay_with_damaged_counters_changes_nothing(tmp_path: Path) -> None:
    written(tmp_path)
    flip(tmp_path / "counters.bin", 70)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    replay = Replay(tmp_path, SPEC, capacity=ROWS * ENVS, envs=ENVS)
    assert len(replay) == 0
    replay.close()
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}


# --- folders of earlier versions ------------------------------------------------------------


def make_earlier(folder: Path) -> None:
    """Turn a folder into one of format 1, which has no checksums."""
    (folder / "checksums.bin").unlink()
    os.truncate(folder / "counters.bin", 16)
    meta = json.loads((folder / "replay.json").read_text())
    del meta["spare"]
    (folder / "replay.json").write_text(json.dumps({**meta, "format": 1}))


def test_a_folder_of_an_earlier_version_gets_checksums_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = written(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    make_earlier(tmp_path)
    with caplog.at_level(logging.INFO, "latentplan"):
        opened(tmp_path, state).close()
    (message,) = caplog.messages
    assert "earlier version" in message and "checksums" in message
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    caplog.clear()
    flip(tmp_path / "reward.bin", 3)
    assert len(opened(tmp_path, state)) == ENVS * ROWS - 1
    (message,) = caplog.messages
    assert "earlier version" not in message and "damaged" in message


def test_computing_the_first_checksums_can_be_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = written(tmp_path)
    make_earlier(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("latentplan.data.files.ReplayFiles.describe", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            Replay(tmp_path, SPEC, capacity=ROWS * ENVS, envs=ENVS)
    flip(tmp_path / "checksums.bin", 5)  # it is computed again
    assert len(opened(tmp_path, state)) == ENVS * ROWS


def test_damaged_counters_of_an_earlier_version_are_an_error(tmp_path: Path) -> None:
    state = written(tmp_path)
    make_earlier(tmp_path)
    flip(tmp_path / "counters.bin", 70)
    with pytest.raises(UserError, match=r"counters of the replay in .* are damaged"):
        opened(tmp_path, state)
    (tmp_path / "counters.bin").write_bytes(b"12345678")
    with pytest.raises(UserError, match="missing or cut short"):
        opened(tmp_path, state)


# --- a power cut ----------------------------------------------------------------------------


@pytest.mark.parametrize("more", [40, 700, 1500])
def test_no_torn_or_future_row_is_sampled_after_a_power_cut(tmp_path: Path, more: int) -> None:
    """The disk holds each page as it was at the checkpoint or at a later time.

    In the first trial only the counters are old, so whole rows are newer than they say.
    """
    rows, saved = 1000, 2500
    replay = Replay(tmp_path / "old", SPEC, capacity=ENVS * rows, envs=ENVS)
    fill(replay, range(saved), ENVS)
    replay.flush()
    state = replay.state_dict()
    old = {path.name: path.read_bytes() for path in (tmp_path / "old").glob("*.bin")}
    fill(replay, range(saved, saved + more // 2), ENVS)
    replay.flush()  # a later checkpoint, which is damaged
    fill(replay, range(saved + more // 2, saved + more), ENVS)
    new = {path.name: path.read_bytes() for path in (tmp_path / "old").glob("*.bin")}
    rng = np.random.default_rng(more)
    for trial in range(8):
        folder = tmp_path / str(trial)
        shutil.copytree(tmp_path / "old", folder)
        for name, content in old.items():
            count = len(content) // PAGE + 1
            late = rng.random(count) < 0.5 if trial else [name != "counters.bin"] * count
            pages = [
                (new[name] if late[start // PAGE] else content)[start : start + PAGE]
                for start in range(0, len(content), PAGE)
            ]
            (folder / name).write_bytes(b"".join(pages))
        replay = opened(folder, state, rows=rows)
        intact = saved - (saved + more - rows)  # rows that were not overwritten
        assert len(replay) >= ENVS * intact
        if replay.ready(LENGTH):
            # `windows` checks every field of every row.
            drawn = windows(replay, LENGTH, 4000)
            assert {start for _, start in drawn} <= set(range(saved - rows, saved - LENGTH + 1))
        replay.close()
        if intact > LENGTH:  # training goes on
            replay = opened(folder, state, rows=rows)
            for step in range(saved, saved + 60):
                replay.add(make_row(step, ENVS, first=step % 5 == 0), np.full(ENVS, step // 5))
            windows(replay, LENGTH, 2000)
            replay.close()
