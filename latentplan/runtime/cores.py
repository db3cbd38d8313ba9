"""Whether other programs use the cores. Torch is imported after this, so it is not used here."""

from __future__ import annotations

import logging
import os

import psutil

log = logging.getLogger("latentplan")


def in_use() -> float:
    """The number of busy cores, averaged over the last minute."""
    return psutil.getloadavg()[0]


def limit_threads_to_idle_cores() -> None:
    """Let torch, which is imported later, use only the idle cores.

    Threads that share cores with other programs, such as a run in the background, wait for each
    other and make torch slower. A value of OMP_NUM_THREADS that the user has set stays.
    """
    idle = max(1, (os.cpu_count() or 1) - round(in_use()))
    os.environ.setdefault("OMP_NUM_THREADS", str(idle))


def warn_if_busy(threads: int) -> None:
    """Log a warning if training with so many threads would share cores with other programs."""
    cores, busy = os.cpu_count() or 1, in_use()
    if threads > 1 and threads + busy > cores + 0.5:
        log.warning(
            "other programs keep %.1f of %d cores busy: with %d threads training can be much "
            "slower than with train.threads=1",
            *(busy, cores, threads),
        )
