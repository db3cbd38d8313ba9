"""Actions of the agent, and those of environments.

The agent's actions (A,) are in [-1, 1]. Discrete ones are one-hot: `groups` are the numbers of
choices, one group behind the other, and the sum of the groups is A. Without groups they are
continuous.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from latentplan.types import EnvSpec

Groups = tuple[int, ...]


class Actions(NamedTuple):
    """The actions of an environment.

    Attributes:
        low, high: (A,) finite bounds. Of discrete actions, the first and last choices (G,).
        dtype: of the environment's actions.
        shape: of the environment's actions. None: one axis.
        groups: numbers of choices of discrete actions, whose sum is A. Empty: continuous.
        names: (A,) of discrete actions, where the environment has some.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]
    dtype: str = "float64"
    shape: tuple[int, ...] | None = None
    groups: Groups = ()
    names: tuple[str, ...] = ()

    @property
    def dim(self) -> int:
        """A, the number of entries of the agent's actions."""
        return sum(self.groups) or len(self.low)

    def to_environment(self, action: np.ndarray) -> np.ndarray:
        """Convert an action (A,) of the agent to the environment's, in its type and shape.

        Continuous actions are clipped to [-1, 1] and scaled to the bounds. The result is never
        beyond a bound, not even by rounding. Each integer between integer bounds gets an equal
        share of [-1, 1]. Of discrete actions the result is the number of the choice in each group,
        and a single number where there is one group and the environment has no axis for it.
        """
        low, high = np.array(self.low), np.array(self.high)
        if self.groups:
            command = low + choices(action, self.groups)
        else:
            unit = (np.clip(np.asarray(action, np.float64), -1.0, 1.0) + 1.0) / 2.0
            if np.dtype(self.dtype).kind in "iu":
                scaled = low + np.floor(unit * (high - low + 1))
            else:
                scaled = low + unit * (high - low)
            command = np.clip(scaled, low, high)
        typed = command.astype(self.dtype)
        shaped = typed if self.shape is None else typed.reshape(self.shape)
        # Environments look a choice up in a table, which an array without axes cannot do.
        return shaped[()] if self.groups else shaped


def choices(action: np.ndarray, groups: Groups) -> np.ndarray:
    """(..., A) -> (..., G) int64, the largest entry of each group."""
    parts = np.split(np.asarray(action), np.cumsum(groups)[:-1], -1)
    return np.stack([part.argmax(-1) for part in parts], -1)


def one_hot(chosen: np.ndarray, groups: Groups) -> np.ndarray:
    """(..., G) integers from 0 on -> (..., A) float32; the inverse of `choices`."""
    parts = [np.eye(size, dtype=np.float32)[chosen[..., g]] for g, size in enumerate(groups)]
    return np.concatenate(parts, -1)


def executed(action: np.ndarray, groups: Groups) -> np.ndarray:
    """What is executed for actions (..., A): clipped to [-1, 1], or one-hot."""
    return one_hot(choices(action, groups), groups) if groups else np.clip(action, -1.0, 1.0)


def random_actions(rng: np.random.Generator, count: int, spec: EnvSpec) -> np.ndarray:
    """Uniformly random actions (count, A) float32."""
    groups = spec.action_groups
    if groups:
        return one_hot(rng.integers(0, groups, (count, len(groups))), groups)
    return rng.uniform(-1, 1, (count, spec.action_dim)).astype(np.float32)
