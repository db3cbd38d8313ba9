"""Whether other programs use this machine's cores. Imports no torch: it must come before."""

from __future__ import annotations

import logging
import os

import psutil

log = logging.getLogger("latentplan")


def in_use() -> float:
    """Cores that were busy, averaged over the last minute."""
    return psutil.getloadavg()[0]


def limit_threads_to_idle_cores() -> None:
    """Let torch, imported after this, take the idle cores alone.

    Threads that wait for each other on cores that others use, say a run in the background, cost
    more than they give. Somebody's own OMP_NUM_THREADS stays.
    """
    idle = max(1, (os.cpu_count() or 1) - round(in_use()))
    os.environ.setdefault("OMP_NUM_THREADS", str(idle))


def warn_if_busy(threads: int) -> None:
    """Tell somebody who is about to train with so many threads that the cores are taken."""
    cores, busy = os.cpu_count() or 1, in_use()
    if threads > 1 and threads + busy > cores + 0.5:
        log.warning(
            "other programs keep %.1f of %d cores busy: with %d threads training can be much "
            "slower than with train.threads=1",
            *(busy, cores, threads),
        )
