"""Tasks that need no simulator: one that is learned in minutes, and one for tests."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces

from latentplan.envs.actions import Actions
from latentplan.envs.simulator import (
    FILM_SIZE,
    FRAME_SECONDS,
    Simulator,
    image_space,
    vector_space,
)
from latentplan.types import Entry


def build(name: str, obs: str, image_size: int) -> Simulator:
    """Build the task ``pixels`` (`Blob`), ``discrete`` (`DiscreteBlob`) or ``count`` (`Count`)."""
    tasks: dict[str, type[Blob | Count]] = {"discrete": DiscreteBlob, "count": Count}
    return tasks.get(name, Blob)(obs, image_size)


def _observation_space(obs: str, image_size: int, dim: int) -> spaces.Dict:
    parts: dict[str, spaces.Space[Any]] = {}
    if obs in ("pixels", "both"):
        parts["image"] = image_space(image_size, image_size)
    if obs in ("state", "both"):
        parts["vector"] = vector_space(dim)
    return spaces.Dict(parts)


class Blob:
    """A red blob, which the action moves, earns up to 1 per frame near the green goal.

    The blob starts anywhere in the square [-1, 1]^2, and the goal is its center. The reward is
    exp(-2 distance): a random policy earns about 0.25 per frame, the best one about 0.9. An episode
    is truncated after 64 frames. The vector is the position of the blob.
    """

    FRAMES = 64
    SPEED = 0.12  # per frame at full action
    _RADIUS = 0.4  # a world model takes long to represent a blob of few pixels
    frame_seconds, success = FRAME_SECONDS, None
    actions = Actions((-1.0, -1.0), (1.0, 1.0))
    entries: tuple[Entry, ...] = ()

    def __init__(self, obs: str, image_size: int) -> None:
        self.observation_space = _observation_space(obs, image_size, 2)
        self._size = image_size
        self._position = np.zeros(2)
        self._frame = 0

    def reset(self, seed: int, episode: int) -> None:
        self._position = np.random.default_rng(seed).uniform(-1.0, 1.0, 2)
        self._frame = 0

    def advance(self, action: np.ndarray) -> tuple[float, bool, bool]:
        self._position = np.clip(self._position + self.SPEED * action, -1.0, 1.0)
        self._frame += 1
        reward = float(np.exp(-2.0 * np.linalg.norm(self._position)))
        return reward, False, self._frame >= self.FRAMES

    def observe(self) -> dict[str, np.ndarray]:
        observation = {}
        if "image" in self.observation_space.spaces:
            observation["image"] = self._image(self._size)
        if "vector" in self.observation_space.spaces:
            observation["vector"] = self._position.astype(np.float32)
        return observation

    def draw(self) -> np.ndarray:
        return self._image(FILM_SIZE)

    def close(self) -> None: ...

    def _image(self, size: int) -> np.ndarray:
        axis = np.linspace(-1.2, 1.2, size)
        x, y = axis[None, :], -axis[:, None]  # y points up
        distance = ((x - self._position[0]) ** 2 + (y - self._position[1]) ** 2) / self._RADIUS**2
        goal = (np.abs(x) < 0.08) & (np.abs(y) < 0.08)
        image = np.zeros((size, size, 3), np.uint8)
        image[..., 0] = 255 * np.exp(-distance)
        image[..., 1] = 180 * goal
        image[..., 2] = 40
        return image


class DiscreteBlob(Blob):
    """`Blob` whose action is one of five: to stay, or to move in one of four directions."""

    actions = Actions((0.0,), (4.0,), "int64", (), (5,), ("stay", "right", "left", "up", "down"))
    _DIRECTIONS = np.array([(0, 0), (1, 0), (-1, 0), (0, 1), (0, -1)], float)

    def advance(self, action: np.ndarray) -> tuple[float, bool, bool]:
        return super().advance(self._DIRECTIONS[action])


class Count:
    """Observations that name their episode, frame and action, for tests of alignment.

    The vector is (episode, frame, action 0, action 1), the action being the one that led here
    (zeros at a reset). The image's upper half is filled with (episode % 256, frame % 256,
    frame // 256), its lower half with the action scaled to bytes (`action_bytes`). The reward of a
    frame is its number. Episode e lasts `frames(e)` frames; even episodes terminate, odd ones are
    truncated.
    """

    frame_seconds, success = FRAME_SECONDS, None
    actions = Actions((-1.0, -1.0), (1.0, 1.0))
    entries: tuple[Entry, ...] = ()

    def __init__(self, obs: str, image_size: int) -> None:
        self.observation_space = _observation_space(obs, image_size, 4)
        self._size = image_size
        self._episode = self._frame = 0
        self._action = np.zeros(2)

    @staticmethod
    def frames(episode: int) -> int:
        """Length of an episode in frames, between 7 and 11."""
        return 7 + 3 * episode % 5

    @staticmethod
    def action_bytes(action: np.ndarray) -> np.ndarray:
        """(..., 2) in [-1, 1] -> (..., 2) uint8."""
        return np.rint((np.asarray(action) + 1.0) * 127.5).astype(np.uint8)

    def reset(self, seed: int, episode: int) -> None:
        self._episode, self._frame = episode, 0
        self._action = np.zeros(2)

    def advance(self, action: np.ndarray) -> tuple[float, bool, bool]:
        self._action = np.array(action)
        self._frame += 1
        ended = self._frame >= self.frames(self._episode)
        terminates = self._episode % 2 == 0
        return float(self._frame), ended and terminates, ended and not terminates

    def observe(self) -> dict[str, np.ndarray]:
        observation = {}
        if "image" in self.observation_space.spaces:
            observation["image"] = self.draw()
        if "vector" in self.observation_space.spaces:
            values = (self._episode, self._frame, *self._action)
            observation["vector"] = np.array(values, np.float32)
        return observation

    def draw(self) -> np.ndarray:
        image = np.zeros((self._size, self._size, 3), np.uint8)
        half = self._size // 2
        image[:half] = (self._episode % 256, self._frame % 256, self._frame // 256)
        image[half:, :, :2] = self.action_bytes(self._action)
        return image

    def close(self) -> None: ...
