"""Run the runs of a study as processes, several at a time.

Each process is an ordinary ``latentplan train``, which can be resumed.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

from latentplan.study.matrix import Job, jobs, read_study, table

log = logging.getLogger("latentplan")
POLL = 0.5  # seconds
REPORT = 60.0  # seconds between tables if no state changes
# Signals that stop a study or a run after it has saved.
STOPS = [getattr(signal, x) for x in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, x)]
SAVED = (0, *(128 + number for number in STOPS))  # exit codes of a run that has ended or stopped


def run(path: Path) -> int:
    """Run the unfinished runs of a study, ``study.parallel`` at a time.

    Ctrl-C, SIGTERM or SIGHUP stops all runs after each has saved a checkpoint. The same command
    continues them later.

    Returns:
        The exit code: 0 if all runs are done, 1 if one failed or was stopped.

    Raises:
        UserError: the study is not valid, or a run in its folder has other settings.
        KeyboardInterrupt: a signal, whose number is the argument, has stopped the study.
    """
    study = read_study(path)
    matrix = jobs(study, path)
    status: dict[Path, str] = {}
    waiting = [job for job in matrix if not job.done()]
    running: dict[Job, subprocess.Popen] = {}
    threads = max(1, (os.cpu_count() or 1) // study.parallel)
    reported = 0.0
    before = _handle_stops()
    try:
        while waiting or running:
            changed = False
            while waiting and len(running) < study.parallel:
                job = waiting.pop(0)
                running[job] = _start(job, threads)
                status[job.folder], changed = "running", True
            for job in [job for job, process in running.items() if process.poll() is not None]:
                code = running.pop(job).returncode
                failed = code not in SAVED
                ended = "done" if job.done() else "stopped"
                status[job.folder], changed = "failed" if failed else ended, True
                if failed:
                    log.warning(
                        "%s ended with exit code %d; see %s", _name(job), code, _log_path(job)
                    )
            if changed or time.monotonic() - reported > REPORT:
                log.info("\n%s", table(matrix, status))
                reported = time.monotonic()
            time.sleep(POLL)
    finally:
        _stop(running)
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0 if all(job.done() for job in matrix) else 1


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


def _log_path(job: Job) -> Path:
    return job.folder.with_name(job.folder.name + ".log")


def _start(job: Job, threads: int) -> subprocess.Popen:
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "latentplan", "train", *job.overrides]
    if not any(item.startswith("train.threads=") for item in job.overrides):
        command.append(f"train.threads={threads}")
    # Ctrl-C in the terminal does not reach a run in its own session. `_stop` sends it once.
    with _log_path(job).open("ab") as output:
        return subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )


def _stop(running: dict[Job, subprocess.Popen]) -> None:
    """Ask the runs to save and stop, and wait for them."""
    for process in running.values():
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
    for process in running.values():
        process.wait()
