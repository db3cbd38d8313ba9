"""Schedules, the train ratio, the split of wall-clock time, and the use of memory and disk."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

GIB = 2.0**30


class Every:
    """True at most once per ``interval``, in the unit of ``now`` (frames or seconds).

    Due times lie on a fixed grid, ``first + k * interval``, so a late call does not shift the next
    ones and a long gap is answered once. ``first`` is ``interval`` unless given; with ``first=0``
    the first call fires. An interval of 0 or less never fires.
    """

    def __init__(self, interval: float, *, first: float | None = None) -> None:
        self._interval = interval
        self._first = interval if first is None else first
        self._due = self._first

    def overdue(self, now: float) -> bool:
        """Whether a call would fire; does not count as one."""
        return self._interval > 0 and now >= self._due

    def __call__(self, now: float) -> bool:
        if not self.overdue(now):
            return False
        passed = math.floor((now - self._first) / self._interval)
        self._due = self._first + (passed + 1) * self._interval
        return True

    def state_dict(self) -> dict[str, float]:
        return {"due": self._due, "interval": self._interval}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue the schedule of ``state``, unless its interval was another one."""
        if state.get("interval", self._interval) == self._interval:
            self._due = state["due"]


class Ratio:
    """The number of updates that are due, if each decision is replayed ``rows_per_decision`` times.

    An update replays ``rows_per_update`` rows (batch * length), so one decision earns
    ``rows_per_decision / rows_per_update`` updates; fractions accumulate. The first call of a run
    only starts the count: decisions before it (the prefill) earn nothing. After
    :meth:`load_state_dict` the count goes on exactly, but a jump of the counter (for example a
    second prefill) earns no more than an ordinary step did, because bursts of updates on old data
    harm the agent.
    """

    def __init__(self, rows_per_decision: float, rows_per_update: float) -> None:
        if rows_per_update <= 0 or rows_per_decision < 0:
            raise ValueError("rows_per_update must be positive, rows_per_decision not negative")
        self._rows_per_decision = rows_per_decision
        self._rows_per_update = rows_per_update
        self._rows = 0.0  # due updates, in rows: sums of whole numbers stay exact
        self._previous: int | None = None
        self._widest = 0  # largest number of decisions between two calls
        self._resumed = False

    def __call__(self, decisions: int) -> int:
        """The updates due now, given the decisions made so far."""
        previous, self._previous = self._previous, decisions
        if previous is None:
            return 0
        step = max(0, decisions - previous)
        if self._resumed:
            step = min(step, self._widest)
            self._resumed = False
        self._widest = max(self._widest, step)
        self._rows += step * self._rows_per_decision
        updates = int(self._rows // self._rows_per_update)
        self._rows -= updates * self._rows_per_update
        return updates

    def state_dict(self) -> dict[str, float | int | None]:
        return {"rows": self._rows, "previous": self._previous, "widest": self._widest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._rows = state["rows"]
        self._previous = state["previous"]
        self._widest = state["widest"]
        # Before its second call a run has no ordinary step to compare with.
        self._resumed = self._widest > 0


class Stopwatch:
    """The split of wall-clock time over named sections, which must not nest."""

    def __init__(self) -> None:
        self.reset()

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - begin
            self._seconds[name] = self._seconds.get(name, 0.0) + spent

    def fractions(self) -> dict[str, float]:
        """The fraction of the time since the last reset, per section; ``other`` is the rest."""
        total = max(time.perf_counter() - self._begin, 1e-9)
        fractions = {name: seconds / total for name, seconds in self._seconds.items()}
        return {**fractions, "other": max(0.0, 1.0 - sum(fractions.values()))}

    def reset(self) -> None:
        self._begin = time.perf_counter()
        self._seconds: dict[str, float] = {}


def memory() -> dict[str, float]:
    """Memory of this process and its children in GiB.

    The system ends a process whose ``memory/rss_gib`` is too large. Pages that are shared with
    files or other processes are counted separately as ``memory/shared_gib``. The replay's mapped
    files would otherwise look like a leak, although the kernel frees their pages when it needs
    memory. ``memory/cuda_gib`` is present when CUDA is in use.
    """
    process = psutil.Process()
    resident = shared = 0
    for member in (process, *process.children(recursive=True)):
        try:
            info = member.memory_info()
        except psutil.Error:  # the process has ended
            continue
        pages = min(getattr(info, "shared", 0), info.rss)  # Linux only
        resident += info.rss - pages
        shared += pages
    result = {"memory/rss_gib": resident / GIB, "memory/shared_gib": shared / GIB}
    torch = sys.modules.get("torch")  # not imported for this alone, which takes seconds
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        result["memory/cuda_gib"] = torch.cuda.max_memory_allocated() / GIB
    return result


def disk(folder: Path) -> dict[str, float]:
    """Disk space of the files in a folder, in GiB. Holes in a file count as nothing."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_blocks * 512
        except FileNotFoundError:  # the file has been replaced
            continue
    return {"memory/disk_gib": total / GIB}
