"""Faults of environments: what they are, when they are survived, and when they stop the run."""

from __future__ import annotations

import logging
import traceback
from collections import deque
from typing import NamedTuple

from latentplan.types import UserError, shown

log = logging.getLogger("latentplan")
WINDOW = 100  # episodes in which ``env.max_faults`` are counted


class TooManyFaultsError(UserError):
    """``env.max_faults`` faults within ``WINDOW`` episodes. A run saves before it stops."""


class BadValueError(UserError):
    """An environment returned a number that no agent can learn from."""


class Fault(NamedTuple):
    """The reason why an episode cannot go on, in plain values that a worker can send."""

    sentence: str
    cause: str  # equal for two faults of the same cause, whatever their sentences contain
    usable: bool = True  # False: an environment that never worked does this, so it is refused
    trace: str = ""  # the traceback, where user code raised


def fault_of(error: BaseException) -> Fault:
    """The fault of an environment that raised ``error``."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    cause = f"{type(error).__name__} at {where.filename}:{where.lineno}"
    if isinstance(error, UserError):
        return Fault(str(error), cause, usable=isinstance(error, BadValueError))
    sentence = (
        f"The environment failed: {type(error).__name__}: {_message(error)} "
        f"({where.filename}, line {where.lineno})."
    )
    return Fault(sentence, cause, trace="".join(traceback.format_exception(error)))


def _message(error: BaseException) -> str:
    """The message of any exception, on one line."""
    try:
        text = str(error)
    except Exception:  # an exception of user code may be unable to give its message
        return "no message"
    return shown(" ".join(text.split()), 500, quoted=False)


class FaultPolicy:
    """Counts the faults of N environments, and refuses or stops where surviving does not help.

    Args:
        task: the name of the task, for messages.
        num_envs: N.
        max_faults: faults within ``WINDOW`` episodes that stop the run.
        worked: the environments are known to work, so that no fault is a reason to refuse them.

    Attributes:
        count: faults so far.
    """

    def __init__(self, task: str, num_envs: int, max_faults: int, *, worked: bool) -> None:
        self.count = 0
        self._task, self._num_envs, self._max = task, num_envs, max_faults
        self._worked = worked
        self._early: list[tuple[int, str]] = []  # environment and cause, while none has worked
        self._recent: deque[int] = (
            deque()
        )  # episodes begun before each fault, over all environments

    def episode_ended(self) -> None:
        """Note that an episode came to its own end: the environments work."""
        self._worked = True

    def add(self, fault: Fault, index: int, episodes: int) -> None:
        """Count and log a fault.

        Args:
            fault: the fault.
            index: the environment, 0 to N - 1.
            episodes: the number of episodes that all environments have begun.

        Raises:
            TooManyFaultsError: there were ``max_faults`` within ``WINDOW`` episodes.
            UserError: the environments cannot be used, because their interface is broken, or
                because each of them begins with the same fault.
        """
        self.count += 1
        if not self._worked:
            self._early.append((index, fault.cause))
            if not fault.usable or self._same_everywhere():
                self._log_trace(fault)
                raise UserError(f"{self._task}: {fault.sentence}")
        self._recent.append(episodes)
        while self._recent[0] <= episodes - WINDOW:
            self._recent.popleft()
        log.warning(
            "environment %d of %s: %s Its episode is cut, and it is built anew (fault %d).",
            *(index, self._task, fault.sentence, self.count),
        )
        if len(self._recent) >= self._max:
            self._log_trace(fault)
            raise TooManyFaultsError(
                f"{self._task}: {fault.sentence} The environments had {len(self._recent)} faults "
                f"within {WINDOW} episodes (env.max_faults={self._max})."
            )
        if fault.trace:
            log.debug("%s", fault.trace)

    def _same_everywhere(self) -> bool:
        """Whether every environment has failed for one and the same cause, at least twice in all.

        A single environment therefore gets a second episode.
        """
        indices, causes = zip(*self._early, strict=True)
        everywhere = len(set(indices)) == self._num_envs and len(indices) >= 2
        return everywhere and len(set(causes)) == 1

    def _log_trace(self, fault: Fault) -> None:
        if fault.trace:
            log.error("the environment's traceback:\n%s", fault.trace.rstrip())
