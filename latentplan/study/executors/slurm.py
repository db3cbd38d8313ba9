"""Train the runs of a study as an array of Slurm jobs, through submitit."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from latentplan.study.executors import Resources, code_of_lost, import_package
from latentplan.study.executors.process import Training
from latentplan.study.matrix import Job
from latentplan.types import UserError

MINUTES = 24 * 60  # of a job, after which it is queued again; slurm.time replaces it


class SlurmExecutor:
    """An array of Slurm jobs, of which ``parallel`` run at a time.

    A job that gets SIGTERM, because others preempt it or its time ends, saves and is queued again.

    Raises:
        UserError: submitit or Slurm is missing, or a parameter is unknown.
    """

    started = "submitted"
    capacity = sys.maxsize  # the queue is Slurm's

    def __init__(self, resources: Resources, cluster: str = "slurm") -> None:
        # Slurm announces a preemption by SIGTERM. submitit reads this when it is imported.
        os.environ.setdefault("SUBMITIT_PREEMPT_SIGNAL", "TERM")
        submitit = import_package("submitit", "slurm")
        folder = resources.folder.absolute() / "submitit"
        self._threads = resources.cpus
        self._stopped = folder / f"stopped-{os.getpid()}"
        self._running: dict[Job, Any] = {}  # with its submitit job
        try:
            self._executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
            self._executor.update_parameters(
                timeout_min=MINUTES,
                cpus_per_task=resources.cpus,
                gpus_per_node=math.ceil(resources.gpus),
                slurm_array_parallelism=resources.parallel,
                **{f"slurm_{key}": value for key, value in resources.slurm.items()},
            )
        except (RuntimeError, NameError) as error:
            raise UserError(f"Slurm cannot be used: {error}.") from error

    def start(self, runs: Sequence[Job]) -> None:
        """Submit an array with a job per run."""
        with self._executor.batch():
            handles = [
                self._executor.submit(SlurmRun(job, self._threads, self._stopped)) for job in runs
            ]
        self._running.update(zip(runs, handles, strict=True))

    def poll(self) -> dict[Job, int]:
        """The exit codes of the jobs that have ended since the last call; 1 for a lost one."""
        ended = {job: _code(job, x) for job, x in self._running.items() if x.done()}
        for job in ended:
            del self._running[job]
        return ended

    def stop(self) -> None:
        """Cancel all jobs. Those that run save first, which this waits for."""
        if not self._running:
            return
        self._stopped.touch()  # a job that is canceled gets SIGTERM too
        for handle in self._running.values():
            handle.cancel()
        for handle in self._running.values():
            handle.exception()
        self._stopped.unlink()


def _code(job: Job, handle: Any) -> int:
    error = handle.exception()
    if error is None:
        return handle.result()
    return code_of_lost(job, error)


class SlurmRun(Training):
    """A run as a job, which submitit tells when the job must make room."""

    def __init__(self, job: Job, threads: int, stopped: Path) -> None:
        super().__init__(job, threads)
        self._stopped = stopped

    def checkpoint(self) -> Any:
        """Save, and return the job to queue again; None if the study itself stops."""
        from submitit.helpers import DelayedSubmission

        self.save()
        if self._stopped.exists():
            return None
        return DelayedSubmission(SlurmRun(self.job, self.threads, self._stopped))
