"""Keeps what an environment does to its whole process apart from the rest of the program.

An environment may draw from the global random generators, and print. In a worker it has them to
itself. In the process of the learner it gets its own while it is called.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import sys
from collections.abc import Iterator

import numpy as np


def seed_global_generators(seed: int) -> None:
    """Seed the generators of Python and NumPy that belong to no object.

    Args:
        seed: less than 2**32.
    """
    random.seed(seed)
    np.random.seed(seed)


def send_output_to_stderr() -> None:
    """Let everything that this worker prints appear on standard error, from C code too."""
    with contextlib.suppress(OSError):  # one of the two is closed
        os.dup2(2, 1)


class Isolation:
    """The global generators and the output of one environment in a process that it shares."""

    def __init__(self) -> None:
        self._generators = random.getstate(), np.random.get_state()

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Give the environment its generators, and send what it prints to standard error."""
        ours = random.getstate(), np.random.get_state()
        _set_generators(*self._generators)
        try:
            with _output_on_stderr():
                yield
        finally:
            self._generators = random.getstate(), np.random.get_state()
            _set_generators(*ours)


def _set_generators(python: tuple[object, ...], numpy: object) -> None:
    random.setstate(python)
    np.random.set_state(numpy)  # type: ignore[arg-type]


@contextlib.contextmanager
def _output_on_stderr() -> Iterator[None]:
    sys.stdout.flush()
    try:
        stdout = os.dup(1)
    except OSError:  # it is closed
        stdout = None
    if stdout is not None:
        send_output_to_stderr()
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        if stdout is not None:
            ctypes.CDLL(None).fflush(None)  # C code keeps what it prints until later
            os.dup2(stdout, 1)
            os.close(stdout)
