"""Batches that are gathered during an update equal those that are gathered after it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import VECTOR, random_batch

from latentplan.data.batches import BatchSampler
from latentplan.data.replay import Replay

CPU = torch.device("cpu")


@pytest.fixture
def replay(tmp_path: Path) -> Replay:
    replay = Replay(tmp_path, VECTOR, capacity=60, envs=2)
    rows, _ = random_batch(2, 40)
    for t in range(40):
        replay.add(rows.map(lambda x, t=t: x[:, t].numpy()), np.zeros(2, np.int64))
    return replay


def test_prefetching_keeps_the_order_of_batches(replay: Replay) -> None:
    drawn = []
    for ahead in (False, True):
        batches = BatchSampler(replay, 3, 5, np.random.default_rng(0), CPU, ahead)
        for _ in range(4):
            batch, episode = batches.sample()
            with batches.prefetch():
                drawn.append((batch.reward.clone(), episode.clone()))
        batches.close()
    for (a, b), (c, d) in zip(drawn[:4], drawn[4:], strict=True):
        assert torch.equal(a, c) and torch.equal(b, d)
    assert not torch.equal(drawn[0][0], drawn[1][0])


def test_the_replay_is_not_read_after_the_update(replay: Replay) -> None:
    """Otherwise a batch could mix old rows with the rows that overwrite them."""
    batches = BatchSampler(replay, 3, 5, np.random.default_rng(0), CPU, ahead=True)
    with batches.prefetch():
        pass
    assert batches._next.done()
    batches.close()


def test_an_error_in_prefetching_is_raised_by_the_next_sample(replay: Replay) -> None:
    batches = BatchSampler(replay, 3, 500, np.random.default_rng(0), CPU, ahead=True)
    with batches.prefetch():
        pass
    with pytest.raises(ValueError, match="no window"):
        batches.sample()
    batches.close()
