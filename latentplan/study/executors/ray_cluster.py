"""Train the runs of a study on a Ray cluster.

Each run is a task with its cores and GPUs. Ray starts the task again where its worker or its
machine is lost, and the run goes on from its checkpoint.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from latentplan.study.executors import Resources, code_of_lost, import_package
from latentplan.study.executors.process import Training
from latentplan.study.matrix import Job
from latentplan.types import UserError

RETRIES = 5  # of a run whose worker was lost
STORE_BYTES = 100 * 2**20  # of the object store; the tasks exchange exit codes only
LOOPBACK = ("", "127.0.0.1:", "localhost:")  # beginnings of addresses of this machine


class RayExecutor:
    """Tasks of a Ray cluster, ``parallel`` at a time.

    Raises:
        UserError: ray is not installed, or the cluster cannot be reached.
    """

    started = "running"

    def __init__(self, resources: Resources, address: str) -> None:
        self.capacity = resources.parallel
        self._ray = _connected(address)
        self._train = self._ray.remote(
            num_cpus=resources.cpus, num_gpus=resources.gpus, max_retries=RETRIES
        )(_train)
        self._threads = resources.cpus
        self._running: dict[Job, Any] = {}  # with the reference of the task's result

    def start(self, runs: Sequence[Job]) -> None:
        """Submit a task per run."""
        for job in runs:
            self._running[job] = self._train.remote(Training(job, self._threads))

    def poll(self) -> dict[Job, int]:
        """The exit codes of the tasks that have ended since the last call; 1 for a lost one."""
        if not self._running:
            return {}
        ready, _ = self._ray.wait(
            [*self._running.values()], num_returns=len(self._running), timeout=0
        )
        ended = {job: self._code(job) for job, task in self._running.items() if task in ready}
        for job in ended:
            del self._running[job]
        return ended

    def _code(self, job: Job) -> int:
        try:
            return self._ray.get(self._running[job])
        except self._ray.exceptions.RayError as error:
            return code_of_lost(job, error)

    def stop(self) -> None:
        """Let all runs save and stop, wait for them, and leave the cluster."""
        for task in self._running.values():
            self._ray.cancel(task)  # raises KeyboardInterrupt in a task that runs
        if self._running:
            self._ray.wait([*self._running.values()], num_returns=len(self._running))
        self._ray.shutdown()


def _train(training: Training) -> int:
    return training()


def _connected(address: str) -> Any:
    """The module ray, connected to the cluster, or to a new one on this machine."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address.startswith(LOOPBACK[1:]) or not address:
        # Otherwise Ray replaces 127.0.0.1 by an address that other machines reach.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    ray = import_package("ray", "ray")
    quiet = {"log_to_driver": False, "logging_level": "error"}
    own = {"num_cpus": os.cpu_count(), "object_store_memory": STORE_BYTES}
    try:
        if address:
            ray.init(address=address, **quiet)
        else:
            ray.init(address="local", include_dashboard=False, **own, **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"The Ray cluster cannot be reached: {reason}") from error
    return ray
