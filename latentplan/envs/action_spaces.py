"""Which action spaces of Gymnasium environments are used, and how."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium import spaces

from latentplan.envs.actions import Actions
from latentplan.types import UserError

_UNLIMITED = 1e9  # a bound of this size or more only says that there is none
MOST_CHOICES = 4096  # of discrete actions, over all groups
_LONGEST_NAME = 40  # characters


def actions_of(space: spaces.Space[Any], meanings: Sequence[object] = ()) -> Actions:
    """Read an action space.

    Args:
        meanings: the names that the environment gives to its discrete actions. They are used if
            there is a different one for each action.

    Raises:
        UserError: the space is not supported; a part of a sentence.
    """
    if isinstance(space, spaces.Discrete):
        return _discrete(np.array([space.n]), space, meanings)
    if isinstance(space, spaces.MultiDiscrete):
        return _discrete(space.nvec, space, ())
    if not isinstance(space, spaces.Box):
        raise UserError(
            f"its actions are {type(space).__name__}, and only Box, Discrete and MultiDiscrete are "
            "supported."
        )
    kind = np.dtype(space.dtype)
    if kind.kind not in "iuf":
        raise UserError(f"its actions are a Box of {kind}.")
    low, high = (bound.reshape(-1).astype(float) for bound in (space.low, space.high))
    largest = _UNLIMITED if kind.kind != "f" else min(_UNLIMITED, float(np.finfo(kind).max))
    unlimited = (-low >= largest) | (high >= largest)
    if unlimited.any():
        raise UserError(
            f"its actions have no bounds in {unlimited.sum()} of {unlimited.size} dimensions. Give "
            "its Box finite limits, or wrap it in gymnasium.wrappers.TransformAction with such a "
            "Box."
        )
    return Actions(tuple(low.tolist()), tuple(high.tolist()), kind.name, space.shape)


def _discrete(
    counts: np.ndarray,
    space: spaces.Discrete | spaces.MultiDiscrete,
    meanings: Sequence[object],
) -> Actions:
    groups = tuple(map(int, counts.reshape(-1)))
    if sum(groups) > MOST_CHOICES:
        raise UserError(
            f"it has {sum(groups)} discrete actions, and at most {MOST_CHOICES} are supported."
        )
    first = np.asarray(space.start, float).reshape(-1)
    names = tuple(str(name)[:_LONGEST_NAME] for name in meanings)
    unique = len(set(names)) == sum(groups) == len(names)
    return Actions(
        tuple(first.tolist()),
        tuple((first + groups - 1).tolist()),
        np.dtype(space.dtype).name,
        tuple(space.shape or ()),
        groups,
        names if unique else (),
    )
