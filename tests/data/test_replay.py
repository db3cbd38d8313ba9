from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest

from latentplan.data.replay import Replay
from latentplan.runtime import disk
from latentplan.types import EnvSpec, PlanTarget, Timestep, UserError

SPEC = EnvSpec({"image": ((4, 4, 3), "uint8"), "vector": ((2,), "float32")}, 3, 2)
Usage = namedtuple("Usage", "total used free")


def make_row(step: int, envs: int, *, first: bool = False) -> Timestep:
    """Row ``step``; every field contains the step or the environment."""
    env = np.arange(envs)
    return Timestep(
        obs={
            "image": np.full((envs, 4, 4, 3), step % 256, np.uint8),
            "vector": np.stack([env, np.full(envs, step)], 1).astype(np.float32),
        },
        prev_action=np.full((envs, 3), step, np.float32),
        reward=(1000.0 * env + step).astype(np.float32),
        is_first=np.full(envs, first),
        is_terminal=np.full(envs, step % 2 == 1),
    )


def fill(replay: Replay, steps: range, envs: int, length: int = 5) -> None:
    for step in steps:
        first = step % length == 0
        replay.add(make_row(step, envs, first=first), np.full(envs, step // length))


def windows(replay: Replay, length: int, draws: int = 400) -> set[tuple[int, int]]:
    """Sample many windows, check every field, and return their (environment, first step)."""
    rows, episode = replay.sample(draws, length, np.random.default_rng(0))
    steps = rows.obs["vector"][..., 1].astype(int)
    assert steps.shape == episode.shape == (draws, length)
    env = rows.obs["vector"][..., 0].astype(int)
    assert (np.diff(steps, axis=1) == 1).all(), "windows are contiguous"
    assert (env == env[:, :1]).all(), "a window has rows of one environment"
    assert (rows.obs["image"] == (steps % 256)[..., None, None, None]).all()
    assert (rows.prev_action == steps[..., None]).all()
    assert (rows.reward == 1000 * env + steps).all()
    assert (rows.is_first == (steps % 5 == 0)).all()
    assert (rows.is_terminal == (steps % 2 == 1)).all()
    assert (episode == steps // 5).all()
    return {(int(e), int(s)) for e, s in zip(env[:, 0], steps[:, 0], strict=True)}


def test_windows_within_episodes_have_rows_of_one_episode(tmp_path: Path) -> None:
    replay = Replay(tmp_path, SPEC, capacity=40, envs=1)
    fill(replay, range(40), 1)  # episodes of five rows
    rows = replay.sample_within_episodes(20, 3, np.random.default_rng(0))
    steps = rows.obs["vector"][..., 1].astype(int)
    assert steps.shape == (20, 3) and (steps // 5 == steps[:, :1] // 5).all()
    assert set((steps[:, 0] % 5).tolist()) == {0, 1, 2}
    assert len(replay.sample_within_episodes(20, 6, np.random.default_rng(0)).reward) == 0
    replay.close()


def test_sampled_windows_equal_those_of_a_brute_force_search(tmp_path: Path) -> None:
    """For random sizes, exactly the windows of the last rows of each environment are drawn."""
    rng = np.random.default_rng(1)
    for trial in range(40):
        envs, rows = int(rng.integers(1, 4)), int(rng.integers(1, 14))
        spare = int(rng.integers(0, envs))  # capacity need not be a multiple of the environments
        replay = Replay(tmp_path / str(trial), SPEC, capacity=rows * envs + spare, envs=envs)
        added = 0
        for _ in range(4):
            more = int(rng.integers(0, 9))
            fill(replay, range(added, added + more), envs)
            added += more
            length = int(rng.integers(1, rows + 1))
            held = min(added, rows)
            assert len(replay) == held * envs
            assert replay.ready(length) == (held >= length)
            if replay.ready(length):
                starts = range(added - held, added - length + 1)
                assert windows(replay, length) == {(e, s) for e in range(envs) for s in starts}
            else:
                with pytest.raises(ValueError, match="no window"):
                    replay.sample(1, length, rng)
        replay.close()


def test_sampling_is_uniform_and_repeatable(tmp_path: Path) -> None:
    replay = Replay(tmp_path, SPEC, capacity=20, envs=2)
    fill(replay, range(17), 2)
    rows, _ = replay.sample(7000, 4, np.random.default_rng(0))
    again, _ = replay.sample(7000, 4, np.random.default_rng(0))
    np.testing.assert_array_equal(rows.reward, again.reward)
    _, counts = np.unique(rows.reward[:, 0], return_counts=True)
    assert len(counts) == 14
    assert counts.min() > 400 and counts.max() < 600  # 500 +- 22


def test_samples_have_the_spec_dtypes_and_their_own_memory(tmp_path: Path) -> None:
    replay = Replay(tmp_path, SPEC, capacity=10, envs=1)
    fill(replay, range(10), 1)
    rows, episode = replay.sample(2, 3, np.random.default_rng(0))
    dtypes = [rows.obs["image"].dtype, rows.obs["vector"].dtype, rows.prev_action.dtype]
    assert dtypes == [np.uint8, np.float32, np.float32]
    assert (rows.reward.dtype, rows.is_first.dtype, rows.is_terminal.dtype) == (
        np.float32,
        np.bool_,
        np.bool_,
    )
    assert episode.dtype == np.int64
    rows.obs["vector"][:] = -1
    assert len(windows(replay, 3)) == 8


def test_add_refuses_rows_that_would_broadcast(tmp_path: Path) -> None:
    replay = Replay(tmp_path, SPEC, capacity=10, envs=2)
    with pytest.raises(ValueError, match=r"obs\.image"):
        replay.add(make_row(0, 1), np.zeros(1, np.int64))
    with pytest.raises(ValueError, match="episode"):
        replay.add(make_row(0, 2), np.zeros(1, np.int64))
    assert len(replay) == 0


def test_a_reopened_replay_has_all_rows(tmp_path: Path) -> None:
    replay = Replay(tmp_path, SPEC, capacity=20, envs=2)
    fill(replay, range(13), 2)
    before, state = windows(replay, 4), replay.state_dict()
    replay.close()
    replay = Replay(tmp_path, SPEC, capacity=20, envs=2)
    assert (len(replay), windows(replay, 4)) == (20, before)
    replay.load_state_dict(state)
    assert (len(replay), windows(replay, 4)) == (20, before)


@pytest.mark.parametrize("spare", [0, 1, 5, 30])
def test_a_crash_loses_only_rows_after_the_checkpoint_and_those_they_overwrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spare: int
) -> None:
    """The replay is compared with a brute-force model of its slots, over several crashes."""
    monkeypatch.setattr("latentplan.data.replay._spare_rows", lambda rows: spare)
    rng = np.random.default_rng(2)
    for trial in range(30):
        folder, rows = tmp_path / str(trial), int(rng.integers(2, 12))
        slots: dict[int, int] = {}  # slot -> step
        saved, cursor = {"cursor": 0, "rows": rows, "envs": 1}, 0
        for _ in range(5):
            replay = Replay(folder, SPEC, capacity=rows, envs=1)
            # Rows that are newer than the checkpoint are dropped.
            slots = {slot: step for slot, step in slots.items() if step < saved["cursor"]}
            cursor = saved["cursor"]
            replay.load_state_dict(saved)
            for _ in range(2):
                steps = range(cursor, cursor + int(rng.integers(0, 2 * rows)))
                fill(replay, steps, 1)
                slots.update({step % (rows + spare): step for step in steps})
                cursor = steps.stop
                if rng.random() < 0.5:
                    saved = replay.state_dict()
                held = sorted(step for step in slots.values() if step >= cursor - rows)
                assert len(replay) == len(held)
                if held:
                    assert held == list(range(cursor - len(held), cursor))
                    assert windows(replay, 1) == {(0, step) for step in held}
            _crash(replay)


@pytest.mark.usefixtures("without_spare_rows")
def test_a_row_cut_off_halfway_is_never_sampled(tmp_path: Path) -> None:
    replay = Replay(tmp_path, SPEC, capacity=6, envs=1)
    fill(replay, range(9), 1)
    torn = make_row(9, 1)._replace(reward=np.array(["no number"]))
    with pytest.raises(ValueError, match="no number"):
        replay.add(torn, np.zeros(1, np.int64))
    _crash(replay)
    replay = Replay(tmp_path, SPEC, capacity=6, envs=1)
    # Step 3 shared its slot with the torn row.
    assert windows(replay, 2) == {(0, 4), (0, 5), (0, 6), (0, 7)}


def test_a_killed_process_leaves_whole_rows(tmp_path: Path) -> None:
    program = """
import sys, itertools, pathlib
from tests.data.test_replay import SPEC, Replay, fill
replay = Replay(pathlib.Path(sys.argv[1]), SPEC, capacity=200, envs=2)
for step in itertools.count():
    fill(replay, range(step, step + 1), 2)
    if step == 300:
        print("going", flush=True)
"""
    command = [sys.executable, "-c", program, str(tmp_path)]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=root) as process:
        process.stdout.readline()
        process.kill()
    replay = Replay(tmp_path, SPEC, capacity=200, envs=2)
    assert len(replay) >= 2 * 99
    last = max(step for _, step in windows(replay, 10))
    assert last >= 300 - 10


def test_history_is_every_row_in_order(tmp_path: Path) -> None:
    replay = Replay(tmp_path / "r", SPEC, capacity=14, envs=2)
    fill(replay, range(4), 2)
    assert replay.history().reward.tolist() == [[0, 1, 2, 3], [1000, 1001, 1002, 1003]]
    rows = replay.history()
    rows.reward[:] = 0
    assert replay.history().reward.any()
    fill(replay, range(4, 8), 2)  # around the ring
    with pytest.raises(UserError, match="first 1 rows"):
        replay.history()
    replay.close()


def test_clear_removes_the_rows(tmp_path: Path) -> None:
    replay = Replay(tmp_path, SPEC, capacity=6, envs=1)
    fill(replay, range(9), 1)
    replay.clear()
    assert len(replay) == 0 and not replay.ready(1)
    fill(replay, range(2), 1)
    assert windows(replay, 1) == {(0, 0), (0, 1)}


def test_a_checkpoint_newer_than_the_folder_is_refused(tmp_path: Path) -> None:
    replay = Replay(tmp_path, SPEC, capacity=6, envs=1)
    fill(replay, range(3), 1)
    with pytest.raises(UserError, match="has 3 rows per environment but the checkpoint"):
        replay.load_state_dict({"cursor": 4, "rows": 6, "envs": 1})
    with pytest.raises(UserError, match="2 x 3 rows"):
        replay.load_state_dict({"cursor": 2, "rows": 3, "envs": 2})
    assert len(windows(replay, 1)) == 3


@pytest.mark.parametrize(
    ("spec", "capacity", "envs", "message"),
    [
        (SPEC._replace(action_dim=4), 20, 2, r"prev_action float32\(3,\).*needs float32\(4,\)"),
        (SPEC._replace(obs={"image": ((8, 8, 3), "uint8")}), 20, 2, r"image uint8\(4, 4, 3\)"),
        (SPEC._replace(obs={"image": SPEC.obs["image"]}), 20, 2, "obs.vector.*needs none"),
        (SPEC, 30, 2, "rows per environment 10 .*needs 15"),
        (SPEC, 10, 1, "environments 2 .*needs 1"),
    ],
)
def test_other_shapes_are_refused_and_nothing_is_lost(
    tmp_path: Path, spec: EnvSpec, capacity: int, envs: int, message: str
) -> None:
    replay = Replay(tmp_path, SPEC, capacity=20, envs=2)
    fill(replay, range(10), 2)
    before = windows(replay, 3)
    replay.close()
    with pytest.raises(UserError, match=message) as error:
        Replay(tmp_path, spec, capacity=capacity, envs=envs)
    assert "\n" not in str(error.value)
    assert windows(Replay(tmp_path, SPEC, capacity=20, envs=2), 3) == before


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    Replay(tmp_path, SPEC, capacity=20, envs=2).close()
    reward = tmp_path / "reward.bin"
    content = reward.read_bytes()
    reward.write_bytes(content[:-1])
    with pytest.raises(UserError, match=r"reward\.bin is missing or cut short"):
        Replay(tmp_path, SPEC, capacity=20, envs=2)
    reward.write_bytes(content)
    (tmp_path / "replay.json").write_text('{"fields": 3}')
    with pytest.raises(UserError, match=r"replay\.json is damaged"):
        Replay(tmp_path, SPEC, capacity=20, envs=2)


def test_the_size_equals_that_of_the_files_on_the_disk(tmp_path: Path) -> None:
    Replay(tmp_path, SPEC, capacity=1000, envs=2)
    sizes = sum(path.stat().st_size for path in tmp_path.glob("*.bin"))
    fields, checksum, counters = 48 + 8 + 12 + 4 + 1 + 1 + 8, 4, 48
    assert sizes - counters == Replay.size_bytes(SPEC, 1000, 2) == 2000 * (fields + checksum)
    blocks = sum(path.stat().st_blocks * 512 for path in tmp_path.glob("*.bin"))
    assert blocks >= sizes, "the blocks are reserved, not only promised"


def test_too_small_a_disk_is_refused_before_any_file_is_created(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = Usage(10**9, 0, 2**28 + 86_000)  # the headroom, and half of the replay's size
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"0\.2 MB .* 0\.1 MB to spare.*replay.capacity=449 "):
        Replay(tmp_path / "run" / "replay", SPEC, capacity=1000, envs=1)
    assert not (tmp_path / "run").exists()
    Replay(tmp_path / "run" / "replay", SPEC, capacity=449, envs=1)


def test_a_disk_that_fills_up_while_allocating_leaves_no_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, offset: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.posix_fallocate", full)
        with pytest.raises(UserError, match=r"cannot be created.*No space left"):
            Replay(tmp_path, SPEC, capacity=10, envs=1)
    assert {path.name for path in tmp_path.iterdir()} <= {"lock"}
    assert len(Replay(tmp_path, SPEC, capacity=10, envs=1)) == 0


def test_an_incomplete_folder_is_created_again(tmp_path: Path) -> None:
    (tmp_path / "reward.bin").write_bytes(b"123")
    replay = Replay(tmp_path, SPEC, capacity=10, envs=1)
    fill(replay, range(4), 1)
    assert len(windows(replay, 1)) == 4


def test_two_runs_cannot_share_a_folder(tmp_path: Path) -> None:
    replay = Replay(tmp_path, SPEC, capacity=10, envs=1)
    with pytest.raises(UserError, match="Another process"):
        Replay(tmp_path, SPEC, capacity=10, envs=1)
    replay.close()
    Replay(tmp_path, SPEC, capacity=10, envs=1)


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_does_not_prevent_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", refuse)
    (tmp_path / "lock").touch()  # the file that a killed process has left
    replay = Replay(tmp_path, SPEC, capacity=10, envs=1)
    fill(replay, range(4), 1)
    assert len(windows(replay, 1)) == 4
    replay.close()
    assert len(Replay(tmp_path, SPEC, capacity=10, envs=1)) == 4


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    program = (
        "import pathlib, sys; from latentplan.runtime import disk; "
        "held = disk.lock(pathlib.Path(sys.argv[1])); print('locked', flush=True); input()"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=Path(__file__).parents[2], **pipes) as process:
        assert process.stdout.readline() == b"locked\n"
        with pytest.raises(UserError, match="Another process is training in"):
            disk.lock(tmp_path)
        process.kill()
    assert (tmp_path / "lock").exists()
    disk.lock(tmp_path).release()


def test_a_lock_file_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "lock").mkdir()
    with pytest.raises(OSError, match="lock"):
        disk.lock(tmp_path)


def test_less_than_a_row_per_environment_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"replay\.capacity=3 has no row for each of 4"):
        Replay(tmp_path / "replay", SPEC, capacity=3, envs=4)


def _crash(replay: Replay) -> None:
    """Do the same as the end of a process: release the lock and flush nothing."""
    replay._files._lock.release()


def test_plans_are_stored_with_the_rows_whose_actions_they_chose(tmp_path: Path) -> None:
    replay = Replay(tmp_path, SPEC, capacity=20, envs=2, plans=True)
    for step in range(10):
        row, number = make_row(step, 2), np.full((2, 3), step, np.float32)
        if step % 3:  # each third row has no plan
            row = row._replace(prev_plan=PlanTarget(number, number + 1, number[:, 0] + 2))
        replay.add(row, np.zeros(2, np.int64))
    replay.close()
    replay = Replay(tmp_path, SPEC, capacity=20, envs=2, plans=True)
    rows, _ = replay.sample(50, 4, np.random.default_rng(0))
    step, plan = rows.reward % 1000, rows.prev_plan
    assert plan is not None
    planned = step % 3 != 0
    assert planned.any() and not planned.all()
    assert (plan.gain == np.where(planned, step + 2, 0)).all()
    expected = np.where(planned, step, 0)[..., None].repeat(3, -1)
    assert (plan.mean == expected).all()
    assert (plan.std == np.where(planned[..., None], expected + 1, 0)).all()
    assert replay.history().prev_plan is not None


def test_a_replay_without_plans_leaves_them_out(tmp_path: Path) -> None:
    number = np.ones((2, 3), np.float32)
    row = make_row(0, 2)._replace(prev_plan=PlanTarget(number, number, number[:, 0]))
    replay = Replay(tmp_path, SPEC, capacity=20, envs=2)
    replay.add(row, np.zeros(2, np.int64))
    assert replay.sample(3, 1, np.random.default_rng(0))[0].prev_plan is None
    replay.close()
    with pytest.raises(UserError, match=r"prev_plan\.mean"):
        Replay(tmp_path, SPEC, capacity=20, envs=2, plans=True)


@pytest.mark.parametrize("name", ["reward", "checksums"])
def test_damage_where_no_row_was_written_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    replay = Replay(tmp_path, SPEC, capacity=20, envs=2)
    fill(replay, range(6), 2)
    saved = replay.state_dict()
    replay.close()
    replay = Replay(tmp_path, SPEC, capacity=20, envs=2)
    replay.load_state_dict(saved)
    assert not caplog.records
    replay.close()
    path = tmp_path / f"{name}.bin"
    content = bytearray(path.read_bytes())
    content[-5] ^= 4  # of the last slot of the last environment
    path.write_bytes(content)
    replay = Replay(tmp_path, SPEC, capacity=20, envs=2)
    replay.load_state_dict(saved)
    assert f"damaged where no row was written yet ({name})" in caplog.text
    assert len(replay) == 12


def test_a_cleared_replay_is_not_taken_for_a_damaged_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    replay = Replay(tmp_path, SPEC, capacity=20, envs=2)
    fill(replay, range(15), 2)
    replay.clear()
    assert len(replay) == 0
    fill(replay, range(4), 2)
    saved = replay.state_dict()
    replay.close()
    replay = Replay(tmp_path, SPEC, capacity=20, envs=2)
    replay.load_state_dict(saved)
    assert not caplog.records and windows(replay, 1) == {(e, s) for e in (0, 1) for s in range(4)}
