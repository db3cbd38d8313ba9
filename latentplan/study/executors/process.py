"""The process of one run: an ordinary ``latentplan train``, which can be resumed."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from latentplan.runtime import disk
from latentplan.study.matrix import Job
from latentplan.types import UserError

POLL = 0.2  # seconds
LOCKED_SECONDS = 600  # for which a run waits until its former process has saved
SAVED_SECONDS = 1.0  # after which a process that a cluster has told to stop need not be told again
SET_PDEATHSIG = 1  # of prctl(2)
# A second SIGHUP does not disturb a run that is saving, and one after SIGTERM does not either.
STOP = signal.SIGHUP
_prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None


def log_path(job: Job) -> Path:
    """The file of the run's output, beside its folder."""
    return job.folder.with_name(job.folder.name + ".log")


def start(job: Job, threads: int, environment: Mapping[str, str] | None = None) -> subprocess.Popen:
    """Start the process of a run. It saves and stops when this process dies, however it dies.

    Call it from the main thread: Linux tells the process when the thread that started it ends.

    Args:
        threads: of the run, unless its settings have ``train.threads``.
        environment: variables besides those of this process.
    """
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "latentplan", "train", *job.overrides]
    if not any(item.startswith("train.threads=") for item in job.overrides):
        command.append(f"train.threads={threads}")
    # Ctrl-C in the terminal does not reach a run in its own session. `stop` sends a signal once.
    with log_path(job).open("ab") as output:
        return subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
            preexec_fn=_stop_with_parent(os.getpid()),
        )


def _stop_with_parent(parent: int) -> Callable[[], None]:
    """A function for a new process, which lets it get ``STOP`` when ``parent`` dies."""

    def prepare() -> None:
        signal.signal(STOP, signal.SIG_DFL)  # nohup(1) may have it ignored
        if _prctl is not None:
            _prctl(SET_PDEATHSIG, int(STOP))
        if os.getppid() != parent:  # it has died before this
            os._exit(1)

    return prepare


def stop(processes: Iterable[subprocess.Popen]) -> None:
    """Ask the processes to save and stop, and wait for them."""
    processes = list(processes)
    for process in processes:
        if process.poll() is None:
            process.send_signal(STOP)
    for process in processes:
        process.wait()


class Training:
    """A run that a worker of a cluster trains. It can be sent to another machine.

    The run's folder must be on storage that the machines share, under the same path.
    """

    def __init__(self, job: Job, threads: int) -> None:
        self.job, self.threads, self.folder = job, threads, os.getcwd()
        self._process: subprocess.Popen | None = None

    def __call__(self) -> int:
        """Train to the end, or until KeyboardInterrupt. Returns the exit code of the process."""
        os.chdir(self.folder)
        _wait_until_unlocked(self.job.folder)
        self._process = start(self.job, self.threads)
        try:
            while self._process.poll() is None:
                time.sleep(POLL)
        except KeyboardInterrupt:
            pass
        finally:
            stop([self._process])
        return self._process.returncode

    def save(self) -> None:
        """Let the run save and stop, after the cluster has sent SIGTERM."""
        if self._process is None:
            return
        # The cluster may have sent it to the process too, which then must not get another signal
        # first: a run that gets SIGTERM as its second signal stops without saving.
        time.sleep(SAVED_SECONDS)
        stop([self._process])


def _wait_until_unlocked(folder: Path) -> None:
    """Wait until no process trains in a folder: a worker may have died a moment ago."""
    end = time.monotonic() + LOCKED_SECONDS
    while folder.is_dir() and time.monotonic() < end:
        try:
            disk.lock(folder).release()
            return
        except UserError:
            time.sleep(POLL)
