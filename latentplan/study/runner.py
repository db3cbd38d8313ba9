"""Run the runs of a study by an executor, and show their progress in one table."""

from __future__ import annotations

import logging
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from latentplan.study.executors import Executor, Resources, make_executor
from latentplan.study.executors.process import log_path
from latentplan.study.matrix import Job, folder_of, jobs, table
from latentplan.study.study_file import read_study
from latentplan.types import UserError

log = logging.getLogger("latentplan")
POLL = 0.5  # seconds
REPORT = 60.0  # seconds between tables
# Signals that stop a study or a run after it has saved.
STOPS = [getattr(signal, x) for x in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, x)]
SAVED = (0, *(128 + number for number in STOPS))  # exit codes of a run that has ended or stopped


def run(path: Path, executor: str = "local", address: str = "", parallel: int = 0) -> int:
    """Run the unfinished runs of a study.

    Ctrl-C, SIGTERM or SIGHUP stops all runs after each has saved a checkpoint. The same command
    continues them later, by the same executor or another one.

    Args:
        path: the file of the study.
        executor: ``local``, ``ray`` or ``slurm``.
        address: of a Ray cluster.
        parallel: the number of runs at a time; 0: as in the file.

    Returns:
        The exit code: 0 if all runs are done, 1 if one failed or was stopped.

    Raises:
        UserError: the study is not valid, a run in its folder has other settings, or the executor
            cannot be used.
        KeyboardInterrupt: a signal, whose number is the argument, has stopped the study.
    """
    if address and executor != "ray":
        raise UserError("--address works only with --executor ray.")
    if parallel < 0:
        raise UserError(f"--parallel must be at least 1, not {parallel}.")
    study = read_study(path)
    study = replace(study, parallel=parallel or study.parallel)
    matrix = jobs(study, path)
    cpus = study.cpus or max(1, (os.cpu_count() or 1) // study.parallel)
    folder = folder_of(study, path)
    resources = Resources(study.parallel, cpus, study.gpus, study.slurm, folder)
    before = _handle_stops()
    try:
        return run_jobs(matrix, make_executor(executor, resources, address))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_jobs(matrix: list[Job], executor: Executor) -> int:
    """Run the unfinished ones of these runs. The result is that of :func:`run`."""
    status: dict[Path, str] = {}
    waiting = [job for job in matrix if not job.done()]
    running: set[Job] = set()
    reported = time.monotonic()
    try:
        while waiting or running:
            room = executor.capacity - len(running)
            if waiting and room > 0:
                started, waiting = waiting[:room], waiting[room:]
                executor.start(started)
                running |= set(started)
                for job in started:
                    _tell(job, executor.started, status)
            for job, code in executor.poll().items():
                running.remove(job)
                ended = "done" if job.done() else "stopped"
                _tell(job, ended if code in SAVED else "failed", status)
                if code not in SAVED:
                    log.warning(
                        "%s ended with exit code %d; see %s", _name(job), code, log_path(job)
                    )
            if time.monotonic() - reported > REPORT:
                log.info("\n%s", table(matrix, status))
                reported = time.monotonic()
            time.sleep(POLL)
    finally:
        executor.stop()
    log.info("\n%s", table(matrix, status))
    return 0 if all(job.done() for job in matrix) else 1


def _tell(job: Job, state: str, status: dict[Path, str]) -> None:
    status[job.folder] = state
    log.info("%s: %s", _name(job), state)


def _handle_stops() -> dict[int, Any]:
    """Let the signals raise KeyboardInterrupt. Returns the former handlers by signal."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(number)

    # A shell may start a background program with SIGINT ignored, and it still gets a handler. But
    # where SIGHUP is ignored, by nohup(1), the study shall survive its terminal.
    kept = getattr(signal, "SIGHUP", None)
    ignored = kept is not None and signal.getsignal(kept) is signal.SIG_IGN
    return {x: signal.signal(x, interrupt) for x in STOPS if not (x == kept and ignored)}


def show(path: Path) -> str:
    """The table of a study, whether it is running or not.

    Raises:
        UserError: as :func:`run`.
    """
    return table(jobs(read_study(path), path), {})


def _name(job: Job) -> str:
    return f"{job.task} {job.ablation} seed {job.seed}"
