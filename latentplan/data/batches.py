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
    """Draws batches from a replay: rows (B, T) and the numbers of their episodes (B, T).

    Args:
        ahead: gather the next batch while an update runs (:meth:`prefetch`). The default is True
            on a GPU, which would wait for the batch otherwise. On a CPU it saves no time, and a
            run resumes bit for bit only if every draw is in the checkpoint.
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
        """The next batch, on the learner's device."""
        rows, episode = self._gather() if self._next is None else self._next.result()
        self._next = None
        return rows.to(self.device), episode.to(self.device, non_blocking=True)

    @contextmanager
    def prefetch(self) -> Iterator[None]:
        """Gather the next batch during an update, where ``ahead`` is set.

        The replay is not read any more after the end of the context, so rows may be added then.
        """
        if self._pool is not None:
            self._next = self._pool.submit(self._gather)
        try:
            yield
        finally:
            if self._next is not None:
                self._next.exception()  # waits; an error is raised by the next `sample`

    def _gather(self) -> tuple[Timestep, Tensor]:
        arrays, numbers = self.replay.sample(self.batch, self.length, self.rng)
        rows, episode = arrays.to("cpu"), torch.from_numpy(numbers)
        if self.device.type != "cuda":
            return rows, episode
        return rows.map(torch.Tensor.pin_memory), episode.pin_memory()

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()
