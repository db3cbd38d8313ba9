"""Checksums of the rows of a replay, and windows that leave damaged rows out."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

_NAMED = 5  # ranges of rows that a message names


def row_checksums(fields: Sequence[np.ndarray], rows: np.ndarray) -> np.ndarray:
    """The CRC32 of each row, over all fields and the row's number.

    The number is part of the checksum, because a slot of the ring holds rows of different numbers
    at different times. After a power cut, the disk may have an older or newer row than expected.

    Args:
        fields: the parts of the rows, each (N, ...).
        rows: their numbers (N,).

    Returns:
        Checksums (N,) uint32.
    """
    parts = [np.ascontiguousarray(x).reshape(len(rows), -1).view(np.uint8) for x in fields]
    packed = np.concatenate(parts, axis=1)
    starts = (rows & 0xFFFFFFFF).tolist()
    return np.fromiter(map(zlib.crc32, packed, starts), np.uint32, len(rows))


class DamagedRows:
    """The rows of a replay that do not match their checksums, and the windows between them.

    Args:
        rows: the numbers of the damaged rows of each environment, in ascending order.
    """

    def __init__(self, rows: Sequence[np.ndarray] = ()) -> None:
        self._rows = rows
        self.last = max((int(x[-1]) for x in rows if len(x)), default=-1)
        """The newest damaged row of all environments; -1 if there is none."""

    def count(self, first: int) -> int:
        """The number of damaged rows from row ``first`` on, over all environments."""
        return sum(int((x >= first).sum()) for x in self._rows)

    def windows(self, length: int, first: int, end: int) -> np.ndarray:
        """The windows of ``length`` rows within ``first <= row < end`` without a damaged row.

        Returns:
            One column per run of intact rows, (3, R) int64: the environment, the start of the first
            window, and the number of windows.
        """
        columns = []
        for env, damaged in enumerate(self._rows):
            damaged = damaged[damaged >= first]
            start = np.concatenate([[first], damaged + 1])
            count = np.concatenate([damaged, [end]]) - start - length + 1
            columns.append(np.stack([np.full_like(start, env), start, np.maximum(count, 0)]))
        return np.concatenate(columns, axis=1)

    def draw(
        self, batch: int, length: int, first: int, end: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Draw from :meth:`windows` uniformly: environments (B, 1) and starts (B, 1)."""
        env, start, count = self.windows(length, first, end)
        ends = count.cumsum()
        index = rng.integers(ends[-1], size=(batch, 1))
        run = np.searchsorted(ends, index, side="right")
        return env[run], start[run] + index - (ends - count)[run]

    def __str__(self) -> str:
        """The first damaged rows as text, such as ``environment 0: rows 3 to 7, 12``."""
        texts = (
            f"environment {env}: rows {_ranges(x)}" for env, x in enumerate(self._rows) if len(x)
        )
        return "; ".join(texts)


def _ranges(rows: np.ndarray) -> str:
    """Ascending numbers as text, such as ``3 to 7, 12``; at most ``_NAMED`` ranges."""
    runs = np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1)
    texts = [f"{x[0]} to {x[-1]}" if len(x) > 1 else f"{x[0]}" for x in runs[:_NAMED]]
    return ", ".join(texts + ["..."] * (len(runs) > _NAMED))
