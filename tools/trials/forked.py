"""Functions in forked processes. Importing torch takes seconds, and a fork of this process has it.

The parent must never train: a fork after a backward pass would hang in autograd's threads.
"""

from __future__ import annotations

import os
import pickle
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from trials.report import TrialError

MEMORY = 2**32  # bytes of address space that a child may add to those of its parent


class Answer(NamedTuple):
    """What became of a function in a child."""

    value: Any  # what it returned; None if it did not return
    trouble: str  # empty if it returned, else the error, the signal, or the time limit
    log: str  # the text that it wrote


def start(function: Callable[[], Any], log: Path) -> int:
    """Run a function in a child that ends with it, and return the child's process id."""
    pid = os.fork()
    if pid == 0:
        _run(function, log, None)
    return pid


def call(function: Callable[[], Any], log: Path, seconds: float) -> Answer:
    """Run a function in a child, and wait for what it returns.

    Args:
        function: returns anything that can be pickled.
        log: the file that gets what the child writes.
        seconds: the child and its group are killed after this time.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        _run(function, log, writer)
    os.close(writer)
    sent, in_time = _receive(reader, seconds)
    if not in_time:
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    text = log.read_text(errors="replace") if log.exists() else ""
    if sent:
        value, trouble = pickle.loads(sent)
        return Answer(value, trouble, text)
    end = f"did not end within {seconds:g} s" if not in_time else describe(status)
    return Answer(None, end, text)


def must(function: Callable[[], Any], log: Path, seconds: float = 300.0) -> Any:
    """What a function returns in a child, where it must succeed.

    Raises:
        TrialError: it does not.
    """
    answer = call(function, log, seconds)
    if answer.trouble:
        raise TrialError(f"{answer.trouble}: {answer.log[-1000:]}")
    return answer.value


def describe(status: int) -> str:
    """The end of a process, as `os.waitpid` reports it, in words."""
    if os.WIFSIGNALED(status):
        return f"ended by {signal.Signals(os.WTERMSIG(status)).name}"
    return f"exit code {os.WEXITSTATUS(status)}"


def _receive(reader: int, seconds: float) -> tuple[bytes, bool]:
    """All bytes until the other end is closed, and whether that happened in time."""
    end, sent = time.monotonic() + seconds, b""
    with open(reader, "rb", buffering=0) as file:
        while True:
            if not select.select([file], [], [], max(0.0, end - time.monotonic()))[0]:
                return sent, False
            if not (part := file.read(2**16)):
                return sent, True
            sent += part


def _run(function: Callable[[], Any], log: Path, writer: int | None) -> None:
    """The life of a child. It never returns."""
    code = 1
    try:
        os.setpgrp()  # so that a time limit also ends the processes that the child has started
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(handle, stream)
        _limit_memory()
        value, trouble = None, ""
        try:
            value = function()
            code = 0
        except BaseException as error:
            traceback.print_exc()
            trouble = f"{type(error).__name__}: {error}"[:500]
        if writer is not None:
            with open(writer, "wb") as file:
                file.write(pickle.dumps((value, trouble)))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
