"""Task names. All accepted spellings of a task are mapped to one name."""

from __future__ import annotations

import difflib
import re

from latentplan.types import UserError, shown

# This list exists because a name must be checked without importing dm_control. A test compares it
# with dm_control.
DMC_TASKS: dict[str, tuple[str, ...]] = {
    "acrobot": ("swingup", "swingup_sparse"),
    "ball_in_cup": ("catch",),
    "cartpole": (
        "balance",
        "balance_sparse",
        "swingup",
        "swingup_sparse",
        "three_poles",
        "two_poles",
    ),
    "cheetah": ("run",),
    "dog": ("fetch", "run", "stand", "trot", "walk"),
    "finger": ("spin", "turn_easy", "turn_hard"),
    "fish": ("swim", "upright"),
    "hopper": ("hop", "stand"),
    "humanoid": ("run", "run_pure_state", "stand", "walk"),
    "humanoid_CMU": ("run", "stand", "walk"),
    "lqr": ("lqr_2_1", "lqr_6_2"),
    "manipulator": ("bring_ball", "bring_peg", "insert_ball", "insert_peg"),
    "pendulum": ("swingup",),
    "point_mass": ("easy", "hard"),
    "quadruped": ("escape", "fetch", "run", "walk"),
    "reacher": ("easy", "hard"),
    "stacker": ("stack_2", "stack_4"),
    "swimmer": ("swimmer15", "swimmer6"),
    "walker": ("run", "stand", "walk"),
}
NO_TASK = "none"
DUMMY_TASKS = ("count", "discrete", "pixels")
_ALIASES = {"cup": "ball_in_cup", "pointmass": "point_mass"}  # domain names in other programs


def _normalize(name: str) -> str:
    """``name`` in lower case, with underscores as the only separators."""
    return re.sub(r"[-/:\s]+", "_", name.strip()).lower()


def _spellings() -> dict[str, str]:
    """Every accepted spelling of a dm_control task, normalized, with its ``domain/task``."""
    table: dict[str, str] = {}
    for domain, tasks in DMC_TASKS.items():
        names = [domain, *(alias for alias, full in _ALIASES.items() if full == domain)]
        for task in tasks:
            table |= {f"{name}_{task}".lower(): f"{domain}/{task}" for name in names}
            if task.startswith(domain):  # The domain may be omitted: swimmer6, lqr_2_1.
                table[task] = f"{domain}/{task}"
    return table


def split_dmc(name: str) -> tuple[str, str]:
    """Split a dm_control name into its domain and task.

    ``"ball_in_cup_catch"`` gives ``("ball_in_cup", "catch")``. ``name`` is a name that `parse_task`
    returned.
    """
    domain, task = _spellings()[name.lower()].split("/")
    return domain, task


def has_environment(task: str) -> bool:
    """Whether a task has an environment. ``none`` has none, only recorded rows."""
    return task.strip().lower() != NO_TASK


def parse_task(task: str) -> tuple[str, str]:
    """Split a task in any accepted spelling into ``(suite, name)``.

    ``dmc:walker_walk``, ``walker_walk``, ``walker-walk``, ``dmc_walker_walk`` and ``walker/walk``
    all give ``("dmc", "walker_walk")``. ``cup_catch`` gives ``("dmc", "ball_in_cup_catch")``.
    Gymnasium environments need the prefix ``gym:``. ``none`` gives ``("none", "none")``.

    Raises:
        UserError: the task is unknown. The message names the nearest task.
    """
    if not has_environment(task):
        return NO_TASK, NO_TASK
    suite, colon, name = task.strip().partition(":")
    if colon and suite == "gym":
        if not name:
            raise UserError("gym: must be followed by an environment id, as in gym:Pendulum-v1.")
        return "gym", name
    if colon and suite == "dummy":
        if name not in DUMMY_TASKS:
            choices = ", ".join(f"dummy:{choice}" for choice in DUMMY_TASKS)
            raise UserError(f"Unknown task {shown(task)}: the dummy tasks are {choices}.")
        return "dummy", name
    spellings = _spellings()
    spelling = _normalize(name if colon and suite == "dmc" else task).removeprefix("dmc_")
    if spelling in spellings:
        return "dmc", spellings[spelling].replace("/", "_")
    nearest = difflib.get_close_matches(spelling, spellings, n=1, cutoff=0.0)[0]
    nearest = spellings[nearest].replace("/", "_")
    raise UserError(
        f"Unknown task {shown(task)}; did you mean {nearest!r}? "
        "(Gymnasium environments are written gym:ID, as in gym:Pendulum-v1.)"
    )
