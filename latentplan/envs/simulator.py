"""The interface of a task, and the environment that turns it into episodes of decisions.

A simulator advances frame by frame. `EpisodeEnv` adds the parts that all tasks share: action
scaling, action repeat, the cut of an episode, and its seed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
from gymnasium import spaces
from PIL import Image

from latentplan.envs.actions import Actions
from latentplan.envs.faults import BadValueError
from latentplan.types import Entry, UserError

MODES = ("train", "eval")
FILM_SIZE = 256  # pixels of the shorter side of a picture for people
FRAME_SECONDS = 1 / 30  # of a task that does not tell how long its frames last
_LARGEST_REWARD = float(np.finfo(np.float32).max)


class Simulator(Protocol):
    """A task, one frame at a time."""

    observation_space: spaces.Dict  # "image" uint8 (h, w, 3) and/or "vector" float32 (dim,)
    actions: Actions
    entries: tuple[Entry, ...]  # of a Gymnasium environment's own observations

    @property
    def frame_seconds(self) -> float:
        """Simulated seconds per frame."""

    @property
    def success(self) -> bool | None:
        """What the task said about the last frame. None: it says nothing about success."""

    def reset(self, seed: int, episode: int) -> None:
        """Begin an episode that depends only on ``seed``; ``episode`` is its number."""

    def advance(self, action: np.ndarray) -> tuple[float, bool, bool]:
        """Apply a result of `Actions.to_environment` for one frame; returns reward, terminated,
        truncated."""

    def observe(self) -> dict[str, np.ndarray]:
        """The present observation. It is read once per decision: skipped frames are not drawn."""

    def draw(self) -> np.ndarray:
        """The scene as people look at it, (h, w, 3) uint8, for any observations of the agent.

        Raises:
            UserError: the task cannot be drawn.
        """

    def close(self) -> None: ...


class Spaces(NamedTuple):
    """The spaces of a simulator."""

    observation: spaces.Dict
    actions: Actions
    entries: tuple[Entry, ...]


def image_space(height: int, width: int) -> spaces.Box:
    return spaces.Box(0, 255, (height, width, 3), np.uint8)


def vector_space(dim: int) -> spaces.Box:
    return spaces.Box(-np.inf, np.inf, (dim,), np.float32)


def flatten_state(entries: dict[str, Any]) -> np.ndarray:
    """Concatenate all entries of a state, in the order of their names, to float32 (dim,)."""
    parts = [np.asarray(entries[name], np.float32).reshape(-1) for name in sorted(entries)]
    return np.concatenate(parts)


def episode_seed(seed: int, mode: str, index: int, episode: int) -> int:
    """The seed of one episode: a hash of the run's seed, the environment and the episode number.

    It fits into 32 bits. Seeds of training are even and seeds of evaluation odd, so that they never
    coincide.
    """
    entropy = (seed, MODES.index(mode), index, episode)
    hashed = int(np.random.SeedSequence(entropy).generate_state(1, np.uint32)[0])
    return (hashed & ~1) | MODES.index(mode)


class Picture(NamedTuple):
    """A picture for people."""

    image: np.ndarray  # (h, w, 3) uint8; the shorter side has FILM_SIZE pixels or slightly more
    seconds: float  # simulated seconds from one decision to the next


def film_image(image: np.ndarray) -> np.ndarray:
    """Scale an image (h, w, 3) uint8 to the size of a film.

    A small one is enlarged by a whole number, so that its pixels stay visible as squares.
    """
    shorter = min(image.shape[:2])
    if shorter <= FILM_SIZE:
        scale = -(-FILM_SIZE // shorter)
        return image.repeat(scale, 0).repeat(scale, 1)
    height, width = (round(side * FILM_SIZE / shorter) for side in image.shape[:2])
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BOX))


class Outcome(NamedTuple):
    """What a reset or a decision leads to. It consists of plain values that a worker can send."""

    observation: dict[str, np.ndarray]
    reward: float = 0.0  # summed over the frames
    terminated: bool = False
    truncated: bool = False
    frames: int = 0  # that were used; 0: a reset
    success: bool | None = None  # whether the task called a frame a success; None: it says nothing


class EpisodeEnv:
    """Episodes of decisions over a `Simulator`.

    A decision repeats its action for ``repeat`` frames, sums the rewards and stops at the end of
    the episode. An episode is truncated after ``episode_frames``. The first `reset` builds the
    simulator, so that a failure in it occurs inside a call that has a timeout and reports errors.
    Simulators, drivers and users' environments may raise any exception, and it passes through.
    """

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
    ) -> None:
        self._build, self._spaces = build, known
        self._simulator: Simulator | None = None
        self._repeat, self._limit = repeat, episode_frames
        self._identity = (seed, mode, index)
        self._frame = 0

    def reset(self, episode: int) -> Outcome:
        """Begin the episode of this number, whose seed is that of `episode_seed`.

        Raises:
            UserError: the environment cannot be built, or returned a wrong type or shape.
            BadValueError: the observation is not finite.
        """
        if self._simulator is None:
            self._simulator = self._build()
        self._frame = 0
        self._simulator.reset(episode_seed(*self._identity, episode), episode)
        return Outcome(self._observe())

    def step(self, action: np.ndarray) -> Outcome:
        """Make one decision.

        Args:
            action: (A,) in [-1, 1], which `Actions.to_environment` converts.

        Raises:
            UserError: the environment returned a wrong type or shape.
            BadValueError: the reward or the observation is not finite in float32.
        """
        if self._simulator is None:
            raise RuntimeError("step before reset")
        command = self._spaces.actions.to_environment(action)
        total, frames, terminated, truncated = 0.0, 0, False, False
        success: bool | None = None
        while frames < self._repeat and not (terminated or truncated):
            reward, terminated, truncated = self._simulator.advance(command)
            total += float(reward)
            if self._simulator.success is not None:
                success = bool(success) or self._simulator.success
            frames += 1
            self._frame += 1
            truncated = not terminated and (truncated or self._frame >= self._limit)
        if not abs(total) <= _LARGEST_REWARD:  # NaN is not either
            raise BadValueError(
                f"The environment returned a reward of {total}, which is not finite in float32."
            )
        return Outcome(self._observe(), total, bool(terminated), bool(truncated), frames, success)

    def draw(self) -> Picture:
        """The present scene.

        Raises:
            UserError: the task cannot be drawn.
        """
        if self._simulator is None:
            raise RuntimeError("draw before reset")
        seconds = self._simulator.frame_seconds * self._repeat
        return Picture(film_image(self._simulator.draw()), seconds)

    def close(self) -> None:
        if self._simulator is not None:
            self._simulator.close()
            self._simulator = None

    def _observe(self) -> dict[str, np.ndarray]:
        assert self._simulator is not None  # the first reset has built it
        observation = self._simulator.observe()
        for name, space in self._spaces.observation.spaces.items():
            x = observation[name]
            if x.shape != space.shape or x.dtype != space.dtype:
                raise UserError(
                    f"The environment returned a {name} of shape {x.shape} {x.dtype}, but declared "
                    f"{space.shape} {space.dtype}."
                )
        if "vector" in observation and not np.isfinite(observation["vector"]).all():
            raise BadValueError("The environment returned an observation that is not finite.")
        return {name: observation[name] for name in self._spaces.observation.spaces}
