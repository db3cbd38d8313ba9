"""The interface of a task, and the environment that turns it into episodes of decisions.

A simulator advances frame by frame. `EpisodeEnv` adds the parts that all tasks share: action
scaling, action repeat, the cut of an episode, and its seed.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import gymnasium
import numpy as np
from gymnasium import spaces

from latentplan.types import UserError

MODES = ("train", "eval")


class Simulator(Protocol):
    """A task, one frame at a time."""

    observation_space: spaces.Dict  # "image" uint8 (h, w, 3) and/or "vector" float32 (dim,)
    action_low: np.ndarray  # (A,) finite bounds
    action_high: np.ndarray

    def reset(self, seed: int, episode: int) -> None:
        """Begin an episode that depends only on ``seed``; ``episode`` is its number."""

    def advance(self, action: np.ndarray) -> tuple[float, bool, bool]:
        """Apply ``action`` (A,) for one frame; returns reward, terminated, truncated."""

    def observe(self) -> dict[str, np.ndarray]:
        """The present observation. It is read once per decision: skipped frames are not drawn."""

    def close(self) -> None: ...


class Spaces(NamedTuple):
    """The spaces of a simulator."""

    observation: spaces.Dict
    action_low: tuple[float, ...]
    action_high: tuple[float, ...]

    @property
    def action_dim(self) -> int:
        return len(self.action_low)


def is_image(shape: tuple[int, ...], dtype: np.dtype) -> bool:
    """Whether an entry of an observation is an image: (height, width, 3) uint8."""
    return len(shape) == 3 and shape[-1] == 3 and dtype == np.uint8


def image_space(height: int, width: int) -> spaces.Box:
    return spaces.Box(0, 255, (height, width, 3), np.uint8)


def vector_space(dim: int) -> spaces.Box:
    return spaces.Box(-np.inf, np.inf, (dim,), np.float32)


def flatten_state(entries: dict[str, Any]) -> np.ndarray:
    """Concatenate all entries of a state, in the order of their names, to float32 (dim,)."""
    parts = [np.asarray(entries[name], np.float32).reshape(-1) for name in sorted(entries)]
    return np.concatenate(parts)


def to_bounds(action: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Clip an action (A,) to [-1, 1] and scale it to an environment's bounds (A,)."""
    unit = (np.clip(np.asarray(action, np.float64), -1.0, 1.0) + 1.0) / 2.0
    return low + unit * (high - low)


def episode_seed(seed: int, mode: str, index: int, episode: int) -> int:
    """The seed of one episode: a hash of the run's seed, the environment and the episode number.

    It fits into 32 bits. Seeds of training are even and seeds of evaluation odd, so that they never
    coincide.
    """
    entropy = (seed, MODES.index(mode), index, episode)
    hashed = int(np.random.SeedSequence(entropy).generate_state(1, np.uint32)[0])
    return (hashed & ~1) | MODES.index(mode)


class EpisodeEnv(gymnasium.Env):
    """Episodes of decisions over a `Simulator`, for Gymnasium's vector environments.

    Actions are (A,) in [-1, 1]; they are clipped and scaled to the simulator's bounds. A decision
    repeats its action for ``repeat`` frames, sums the rewards and stops at the end of the episode.
    ``info`` holds the number of ``frames`` that it used. An episode is truncated after
    ``episode_frames``. The first ``reset`` builds the simulator, so that a failure in it occurs
    inside a call that has a timeout and reports errors. ``reset`` ignores its argument ``seed``:
    seeds come from `episode_seed`, counted from ``first_episode``.
    """

    metadata = {"render_modes": []}  # noqa: RUF012 (Gymnasium's own convention)

    def __init__(
        self,
        build: Callable[[], Simulator],
        known: Spaces,
        *,
        repeat: int,
        episode_frames: int,
        seed: int,
        mode: str,
        index: int,
        first_episode: int = 0,
    ) -> None:
        self.observation_space: spaces.Dict = known.observation
        self.action_space = spaces.Box(-1.0, 1.0, (known.action_dim,), np.float32)
        self._build = build
        self._simulator: Simulator | None = None
        self._repeat, self._limit = repeat, episode_frames
        self._identity = (seed, mode, index)
        self._episode = first_episode  # number of the next episode
        self._frame = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Begin the next episode; return its first observation and ``{"frames": 0}``."""
        return self._guard(self._reset)

    def step(
        self, action: np.ndarray
    ) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Make one decision; return observation, summed reward, terminated, truncated, info."""
        return self._guard(lambda: self._step(action))

    def close(self) -> None:
        if self._simulator is not None:
            self._simulator.close()
            self._simulator = None

    def _reset(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        if self._simulator is None:
            self._simulator = self._build()
        episode = self._episode
        self._episode += 1
        self._frame = 0
        self._simulator.reset(episode_seed(*self._identity, episode), episode)
        return self._observe(), {"frames": 0}

    def _step(
        self, action: np.ndarray
    ) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        if self._simulator is None:
            raise RuntimeError("step before reset")
        low, high = self._simulator.action_low, self._simulator.action_high
        scaled = to_bounds(action, low, high)
        total, frames, terminated, truncated = 0.0, 0, False, False
        while frames < self._repeat and not (terminated or truncated):
            reward, terminated, truncated = self._simulator.advance(scaled)
            total += float(reward)
            frames += 1
            self._frame += 1
            truncated = not terminated and (truncated or self._frame >= self._limit)
        if not np.isfinite(total):
            raise UserError(f"The environment returned a reward of {total}.")
        return self._observe(), total, bool(terminated), bool(truncated), {"frames": frames}

    def _observe(self) -> dict[str, np.ndarray]:
        assert self._simulator is not None  # the first reset has built it
        observation = self._simulator.observe()
        for name, space in self.observation_space.spaces.items():
            x = observation[name]
            # Gymnasium would broadcast one number to many, and cast an image in [0, 1] to black.
            if x.shape != space.shape or x.dtype != space.dtype:
                raise UserError(
                    f"The environment returned a {name} of shape {x.shape} {x.dtype}, but declared "
                    f"{space.shape} {space.dtype}."
                )
        if "vector" in observation and not np.isfinite(observation["vector"]).all():
            raise UserError("The environment returned an observation that is not finite.")
        return observation

    @staticmethod
    def _guard(call: Callable[[], Any]) -> Any:
        # Simulators, drivers and users' environments may raise any exception. It must reach the
        # parent process, which may not be able to import the exception's class.
        try:
            return call()
        except UserError:
            raise
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            raise UserError(
                f"The environment failed: {type(error).__name__}: {error} "
                f"({where.filename}, line {where.lineno})."
            ) from error
