"""Where the runs of a study are trained: on this machine, on a Ray cluster, or by Slurm.

Every executor trains a run by the same command in a process of its own (``process.py``), so the
numbers of a run do not depend on the executor.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from latentplan.study.matrix import Job
from latentplan.types import UserError

log = logging.getLogger("latentplan")
NAMES = ("local", "ray", "slurm")


class Resources(NamedTuple):
    """What the runs of a study get."""

    parallel: int  # runs at a time
    cpus: int  # cores per run
    gpus: float  # GPUs per run
    slurm: dict[str, str]  # parameters of sbatch, for example partition
    folder: Path  # of the study's runs


class Executor(Protocol):
    """What trains the runs of a study."""

    capacity: int  # the largest number of runs that it takes at a time
    started: str  # the state of a run that it has taken, for the table

    def start(self, runs: Sequence[Job]) -> None:
        """Begin to train these runs, or go on with them."""

    def poll(self) -> dict[Job, int]:
        """The exit codes of the runs that have ended since the last call."""

    def stop(self) -> None:
        """Let all runs save and stop, wait for them, and free what the executor holds."""


def make_executor(name: str, resources: Resources, address: str = "") -> Executor:
    """The executor of that name.

    Args:
        address: ``host:port`` of a Ray cluster; empty: a cluster on this machine alone.

    Raises:
        UserError: there is no such executor, its package is missing, or it cannot be reached.
    """
    # A package of an executor is imported only where that executor is used.
    if name == "local":
        from latentplan.study.executors.local import LocalExecutor

        return LocalExecutor(resources)
    if name == "ray":
        from latentplan.study.executors.ray_cluster import RayExecutor

        return RayExecutor(resources, address)
    if name == "slurm":
        from latentplan.study.executors.slurm import SlurmExecutor

        return SlurmExecutor(resources)
    raise UserError(f"There is no executor {name!r}; there are: {', '.join(NAMES)}.")


def import_package(package: str, executor: str) -> Any:
    """The package of an executor, which is an optional one of that name.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(
            f"The executor {executor} needs a package: pip install 'latentplan[{executor}]'."
        ) from error


def code_of_lost(job: Job, error: BaseException) -> int:
    """The exit code of a run whose task a cluster has lost, after a warning with the reason."""
    log.warning("%s: %s", job.folder.name, str(error).strip().splitlines()[-1])
    return 1
