"""When faults of environments are survived, and when they are refused or stop the run."""

from __future__ import annotations

import pytest

from latentplan.envs import TooManyFaultsError
from latentplan.envs.faults import WINDOW, BadValueError, Fault, FaultPolicy, fault_of
from latentplan.types import UserError


def policy(num_envs: int = 1, max_faults: int = 10, *, worked: bool = False) -> FaultPolicy:
    return FaultPolicy("task", num_envs, max_faults, worked=worked)


BOOM, OTHER, BROKEN = Fault("Boom.", "a"), Fault("Other.", "b"), Fault("Shape.", "c", usable=False)


def test_a_broken_interface_is_refused_until_an_episode_has_ended() -> None:
    with pytest.raises(UserError, match="task: Shape"):
        policy().add(BROKEN, 0, 1)
    used = policy()
    used.episode_ended()
    used.add(BROKEN, 0, 2)
    policy(worked=True).add(BROKEN, 0, 1)


@pytest.mark.parametrize(
    ("num_envs", "faults", "refused"),
    [
        (1, [(0, BOOM)], False),
        (1, [(0, BOOM), (0, BOOM)], True),
        (1, [(0, BOOM), (0, OTHER)], False),
        (2, [(0, BOOM), (1, BOOM)], True),
        (2, [(0, BOOM), (1, OTHER)], False),
        (2, [(0, BOOM), (0, BOOM)], False),
    ],
)
def test_the_same_fault_in_every_first_episode_is_refused(
    num_envs: int, faults: list[tuple[int, Fault]], refused: bool
) -> None:
    tested = policy(num_envs)
    for index, fault in faults[:-1]:
        tested.add(fault, index, 1)
    if not refused:
        tested.add(faults[-1][1], faults[-1][0], 2)
        return
    with pytest.raises(UserError, match="task: Boom"):
        tested.add(faults[-1][1], faults[-1][0], 2)


def test_faults_are_counted_within_a_window_of_episodes() -> None:
    tested = policy(max_faults=2, worked=True)
    for k in range(5):
        tested.add(BOOM, 0, 1 + k * WINDOW)
    assert tested.count == 5
    with pytest.raises(TooManyFaultsError, match="2 faults within 100 episodes"):
        tested.add(BOOM, 0, 5 * WINDOW)


def test_the_cause_of_a_fault_does_not_depend_on_its_words() -> None:
    def fault(error: Exception) -> Fault:
        try:
            raise error
        except Exception as raised:
            return fault_of(raised)

    one, two = fault(RuntimeError("at\nframe 3")), fault(RuntimeError("at frame 4"))
    assert one.cause == two.cause != fault(ValueError("")).cause
    assert "RuntimeError: at frame 3" in one.sentence and "frame 3" in one.trace
    assert (one.usable, fault(UserError("x")).usable) == (True, False)
    assert fault(BadValueError("x")).usable and not fault(BadValueError("x")).trace


def test_any_exception_gives_a_short_sentence() -> None:
    class Silent(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no text")

    for error, words in ((Silent(), "Silent: no message"), (ValueError("x" * 10**6), "xxx...")):
        try:
            raise error
        except Exception as raised:
            fault = fault_of(raised)
        assert words in fault.sentence and len(fault.sentence) < 1000
