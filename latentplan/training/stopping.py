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


class Stop:
    """A request to stop. The first signal sets it, and the loop reads it after every step."""

    requested = False
    number = 0  # of the signal


@contextmanager
def stop_on_signal() -> Iterator[Stop]:
    """Let the first SIGINT, SIGTERM or SIGHUP request a stop.

    A second SIGINT or SIGTERM raises KeyboardInterrupt with the number of the signal.
    """
    stop = Stop()

    def request_stop(number: int, frame: FrameType | None) -> None:
        if not stop.requested:
            stop.requested, stop.number = True, number
            log.info("stopping: saving a checkpoint (press Ctrl-C again to stop without it)")
        # A closed terminal often sends SIGHUP twice, and systemd sends it behind SIGTERM.
        elif number != HANGUP:
            raise KeyboardInterrupt(number)

    numbers = [signal.SIGINT, signal.SIGTERM]
    # nohup(1) has SIGHUP ignored, because the run shall survive its terminal.
    if HANGUP is not None and signal.getsignal(HANGUP) is not signal.SIG_IGN:
        numbers.append(HANGUP)
    former_handlers = {number: signal.signal(number, request_stop) for number in numbers}
    try:
        yield stop
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
