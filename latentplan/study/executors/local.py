"""Train the runs of a study as processes of this machine."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence

import torch

from latentplan.study.executors import Resources, process
from latentplan.study.matrix import Job


class LocalExecutor:
    """Processes of this machine, ``parallel`` at a time, which share its cores and its GPUs."""

    started = "running"

    def __init__(self, resources: Resources) -> None:
        self.capacity, self._threads = resources.parallel, resources.cpus
        self._running: dict[Job, tuple[subprocess.Popen, int]] = {}  # with the number of its slot

    def start(self, runs: Sequence[Job]) -> None:
        """Start a process per run."""
        for job in runs:
            used = {slot for _, slot in self._running.values()}
            slot = next(x for x in range(self.capacity) if x not in used)
            started = process.start(job, self._threads, gpu_of_slot(slot))
            self._running[job] = (started, slot)

    def poll(self) -> dict[Job, int]:
        """The exit codes of the processes that have ended since the last call."""
        codes = {job: started.poll() for job, (started, _) in self._running.items()}
        ended = {job: code for job, code in codes.items() if code is not None}
        for job in ended:
            del self._running[job]
        return ended

    def stop(self) -> None:
        """Let all runs save and stop, and wait for them."""
        process.stop(started for started, _ in self._running.values())


def gpu_of_slot(slot: int) -> dict[str, str]:
    """The environment variable that gives a run one of several GPUs, each to as many runs."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = named.split(",") if named else [str(x) for x in range(torch.cuda.device_count())]
    return {"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} if len(gpus) > 1 else {}
