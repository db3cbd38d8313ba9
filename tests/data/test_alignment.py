"""Rows of the counting environment stay aligned in the vector environment and the replay."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from environments import make

from latentplan.data.replay import Replay
from latentplan.envs.dummy import Count
from latentplan.types import Timestep


def collect(folder: Path, *, count: int, repeat: int, steps: int, capacity: int) -> Replay:
    """Store random steps of the counting environment in a replay, as the training loop does."""
    rng = np.random.default_rng(0)
    with make("dummy:count", "both", num_envs=count, repeat=repeat, image_size=16) as env:
        replay = Replay(folder, env.spec, capacity=capacity, envs=count)
        row, _ = env.reset()
        for step in range(steps):
            replay.add(row, (env.episodes - 1) * count + np.arange(count))
            if step < steps - 1:
                row, _ = env.step(rng.uniform(-1, 1, (count, 2)).astype(np.float32))
    return replay


def windows(replay: Replay, length: int) -> tuple[Timestep, np.ndarray]:
    return replay.sample(200, length, np.random.default_rng(1))


@pytest.mark.parametrize(("count", "repeat"), [(1, 1), (1, 3), (3, 2)])
def test_every_sampled_row_is_aligned_with_the_action_before_it(
    tmp_path: Path, count: int, repeat: int
) -> None:
    replay = collect(tmp_path, count=count, repeat=repeat, steps=60, capacity=1000)
    rows, number = windows(replay, 12)
    episode, frame = (rows.obs["vector"][..., i].astype(int) for i in (0, 1))
    length = Count.frames(episode)

    # Vector and image both contain the action that led to the observation.
    np.testing.assert_array_equal(rows.obs["vector"][..., 2:], rows.prev_action)
    np.testing.assert_array_equal(rows.obs["image"][:, :, 0, 0, 0], episode)
    np.testing.assert_array_equal(rows.obs["image"][:, :, 0, 0, 1], frame)
    lower = rows.obs["image"][:, :, 15, 0, :2]
    np.testing.assert_array_equal(lower, Count.action_bytes(rows.prev_action))

    np.testing.assert_array_equal(rows.is_first, frame == 0)
    assert not rows.prev_action[rows.is_first].any()
    np.testing.assert_array_equal(rows.is_terminal, (frame == length) & (episode % 2 == 0))
    np.testing.assert_array_equal(number // count, episode)

    # The reward is the sum of the numbers of the frames of one decision.
    begin = (frame - 1) // repeat * repeat
    earned = frame * (frame + 1) // 2 - begin * (begin + 1) // 2
    np.testing.assert_array_equal(rows.reward, np.where(rows.is_first, 0, earned))
    assert rows.is_first.any() and rows.is_terminal.any() and (rows.reward > 0).any()


@pytest.mark.parametrize("capacity", [1000, 90])
def test_windows_are_consecutive_across_ends_of_episodes(tmp_path: Path, capacity: int) -> None:
    """The smaller ring has wrapped around: its 90 rows are the last 30 of 60 steps."""
    replay = collect(tmp_path, count=3, repeat=2, steps=60, capacity=capacity)
    rows, number = windows(replay, 12)
    episode, frame = (rows.obs["vector"][..., i].astype(int) for i in (0, 1))
    last = frame == Count.frames(episode)
    assert last[:, :-1].any()
    following = np.where(last[:, :-1], 0, np.minimum(frame + 2, Count.frames(episode))[:, :-1])
    np.testing.assert_array_equal(frame[:, 1:], following)
    np.testing.assert_array_equal(episode[:, 1:], episode[:, :-1] + last[:, :-1])
    assert (number % 3 == number[:, :1] % 3).all()  # one environment per window
    assert set(number[:, 0] % 3) == {0, 1, 2}
