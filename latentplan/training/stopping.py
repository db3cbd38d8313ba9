"""Requests to stop a session: the signals that ask for one."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import FrameType

log = logging.getLogger("latentplan")
HANGUP = getattr(signal, "SIGHUP", None)


class StopInterrupt(BaseException):
    """A request to stop has ended work that may be interrupted. Not an error."""


class Stop:
    """A request to stop. The first signal sets it, and the loop reads it after every step.

    Work that takes long, such as an evaluation or a compilation, does not wait for that: see
    :meth:`interruptible`.
    """

    def __init__(self) -> None:
        self.requested = False
        self.number = 0  # of the signal
        self._interrupts = False

    def request(self, number: int) -> None:
        """Request a stop, because of the signal ``number``.

        Raises:
            StopInterrupt: the main thread is in an interruptible block.
        """
        self.requested, self.number = True, number
        if self._interrupts:
            raise StopInterrupt

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """A block that a request ends at once. A checkpoint may be written wherever it ends.

        Raises:
            StopInterrupt: a stop is requested before the block or within it.
        """
        if self.requested:
            raise StopInterrupt
        self._interrupts = True
        try:
            yield
        finally:
            self._interrupts = False

    @contextmanager
    def uninterrupted(self) -> Iterator[None]:
        """A part of an interruptible block that a request ends only when the part is complete.

        Work that shares a lock or a queue with another thread belongs here. An exception within the
        queue of TensorBoard's writer loses a wake-up of its thread, and the process then cannot end
        for two minutes, or at all.

        Raises:
            StopInterrupt: a stop was requested within the part.
        """
        interrupts, self._interrupts = self._interrupts, False
        try:
            yield
        finally:
            self._interrupts = interrupts
        if interrupts and self.requested:
            raise StopInterrupt


@contextmanager
def stop_on_signal(stop: Stop) -> Iterator[None]:
    """Let the first SIGINT, SIGTERM or SIGHUP request a stop.

    A second SIGINT or SIGTERM raises KeyboardInterrupt with the number of the signal.
    """

    def request_stop(number: int, frame: FrameType | None) -> None:
        if not stop.requested:
            log.info("stopping: saving a checkpoint (press Ctrl-C again to stop without it)")
            stop.request(number)
        # A closed terminal often sends SIGHUP twice, and systemd sends it behind SIGTERM.
        elif number != HANGUP:
            raise KeyboardInterrupt(number)

    numbers = [signal.SIGINT, signal.SIGTERM]
    # nohup(1) has SIGHUP ignored, because the run shall survive its terminal.
    if HANGUP is not None and signal.getsignal(HANGUP) is not signal.SIG_IGN:
        numbers.append(HANGUP)
    former_handlers = {number: signal.signal(number, request_stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in former_handlers.items():
            signal.signal(number, handler)


def start_resource_tracker() -> None:
    """Start Python's resource tracker, which worker processes need, so that SIGHUP does not end it.

    A terminal sends SIGHUP to all processes of the run. By itself the tracker ignores only SIGINT
    and SIGTERM, and a later one would complain about resources that it does not know.
    """
    if HANGUP is None:
        return
    former = signal.signal(HANGUP, signal.SIG_IGN)  # a new process inherits this
    try:
        resource_tracker.ensure_running()
    finally:
        signal.signal(HANGUP, former)
