"""Replayed batches for updates, on the learner's device."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from latentplan.data.replay import Replay
from latentplan.types import Timestep


class BatchSampler:
    """Samples of a replay, (B, T) rows and the numbers of their episodes.

    Args:
        ahead: gather the next batch while an update runs (:meth:`prefetch`). A GPU would wait for
            it otherwise; a CPU has no time to spare, and a run goes on bit for bit only where
            nothing was drawn that a checkpoint does not know of.
    """

    def __init__(
        self,
        replay: Replay,
        batch: int,
        length: int,
        rng: np.random.Generator,
        device: torch.device,
        ahead: bool | None = None,
    ):
        self.replay, self.batch, self.length, self.rng = replay, batch, length, rng
        self.device = device
        ahead = device.type == "cuda" if ahead is None else ahead
        self._pool = ThreadPoolExecutor(1) if ahead else None
        self._next: Future | None = None

    def sample(self) -> tuple[Timestep, Tensor]:
        """The next batch, on the device."""
        rows, episode = self._gather() if self._next is None else self._next.result()
        self._next = None
        return rows.to(self.device), episode.to(self.device, non_blocking=True)

    @contextmanager
    def prefetch(self) -> Iterator[None]:
        """Around an update. Whoever leaves it may add to the replay: nothing is read any more."""
        if self._pool is not None:
            self._next = self._pool.submit(self._gather)
        try:
            yield
        finally:
            if self._next is not None:
                self._next.exception()  # waits; an error is raised where the batch is taken

    def _gather(self) -> tuple[Timestep, Tensor]:
        arrays, numbers = self.replay.sample(self.batch, self.length, self.rng)
        rows, episode = arrays.to("cpu"), torch.from_numpy(numbers)
        if self.device.type != "cuda":
            return rows, episode
        return rows.map(torch.Tensor.pin_memory), episode.pin_memory()

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()
