"""Gymnasium environments (1.1 or later) with Box actions, as simulators."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from latentplan.envs.simulator import flatten_state, image_space, is_image, vector_space
from latentplan.types import UserError


def build(name: str, obs: str, module: str) -> GymEnvironment:
    """Build the environment with the registered id ``name``.

    Args:
        obs: ``pixels``, ``state`` or ``both``.
        module: a module name or a .py file, which is imported first; empty: none.
    """
    if module:
        import_module(module)
    return GymEnvironment(name, obs)


def import_module(module: str) -> None:
    """Import the module or file that registers a user's environments.

    Raises:
        UserError: it does not exist, or its import fails.
    """
    try:
        if not module.endswith(".py"):
            importlib.import_module(module)
            return
        path = Path(module).resolve()
        name = f"{path.stem}_{hashlib.sha1(str(path).encode()).hexdigest()[:8]}"
        if name in sys.modules:
            return
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise ImportError(f"{path} cannot be imported")
        loaded = importlib.util.module_from_spec(spec)
        sys.modules[name] = loaded  # pickle looks up the classes of the module there
        try:
            spec.loader.exec_module(loaded)
        except BaseException:
            del sys.modules[name]
            raise
    except Exception as error:  # a user's code may raise any exception
        raise UserError(
            f"env.module={module} could not be imported: {type(error).__name__}: {error}"
        ) from error


def _is_image_space(space: spaces.Space) -> bool:
    return isinstance(space, spaces.Box) and is_image(space.shape, space.dtype)


class GymEnvironment:
    """A Gymnasium environment; see `latentplan.envs.simulator.Simulator`.

    The vector holds the numbers of the observation, the entries of a Dict in the order of their
    names. The image is the observation's own uint8 (h, w, 3) entry where there is one, else the
    result of ``render()``. It has its own size; the parent process resizes it.
    """

    def __init__(self, name: str, obs: str) -> None:
        self._name = name
        self._env = self._make(None)
        entries = self._entries_of_space(self._env.observation_space)
        images = [key for key, space in entries.items() if _is_image_space(space)]
        if len(images) > 1:
            raise UserError(
                f"gym:{name} observes several images ({', '.join(images)}): wrap it so that one "
                "is left."
            )
        self._state_keys = [key for key in entries if key not in images]
        self._image_key = images[0] if images else None
        self._draws = obs in ("pixels", "both") and self._image_key is None
        if self._draws:
            self._env.close()
            os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame without a display
            self._env = self._make("rgb_array")
        self.action_low, self.action_high = self._action_bounds()
        parts: dict[str, spaces.Space[Any]] = {}
        if obs in ("pixels", "both"):
            parts["image"] = self._find_image_space(entries)
        if obs in ("state", "both"):
            if not self._state_keys:
                raise UserError(f"gym:{name} observes nothing but images; use obs=pixels.")
            dims = [int(np.prod(entries[key].shape or ())) for key in self._state_keys]
            parts["vector"] = vector_space(sum(dims))
        self.observation_space = spaces.Dict(parts)
        self._observation: dict[str, Any] = {}

    def reset(self, seed: int, episode: int) -> None:
        observation, _ = self._env.reset(seed=seed)
        self._observation = self._entries(observation)

    def advance(self, action: np.ndarray) -> tuple[float, bool, bool]:
        space = self._env.action_space
        action = action.reshape(space.shape).astype(space.dtype)
        observation, reward, terminated, truncated, _ = self._env.step(action)
        self._observation = self._entries(observation)
        return float(reward), bool(terminated), bool(truncated)

    def observe(self) -> dict[str, np.ndarray]:
        observation = {}
        if "image" in self.observation_space.spaces:
            observation["image"] = self._render() if self._draws else self._own_image()
        if "vector" in self.observation_space.spaces:
            states = {key: self._observation[key] for key in self._state_keys}
            observation["vector"] = flatten_state(states)
        return observation

    def close(self) -> None:
        self._env.close()

    def _make(self, render_mode: str | None) -> gymnasium.Env:
        try:
            # Not every environment takes a render_mode, so it is passed only where it is needed.
            mode: dict[str, Any] = {} if render_mode is None else {"render_mode": render_mode}
            return gymnasium.make(self._name, disable_env_checker=True, **mode)
        except gymnasium.error.UnregisteredEnv as error:
            raise UserError(
                f"Gymnasium has no environment {self._name!r} ({error}). "
                "Your own environment needs env.module=FILE.py, a file that registers it."
            ) from error
        except gymnasium.error.DependencyNotInstalled as error:
            raise UserError(f"gym:{self._name} needs another package: {error}.") from error

    def _entries_of_space(self, space: spaces.Space) -> dict[str, spaces.Space]:
        entries = dict(space.spaces) if isinstance(space, spaces.Dict) else {"": space}
        for key, entry in entries.items():
            if not isinstance(entry, spaces.Box):
                part = f"entry {key!r} of its observations" if key else "its observation"
                raise UserError(
                    f"gym:{self._name} cannot be used: {part} is a {type(entry).__name__}, "
                    "and only Box (or a Dict of Box) is supported."
                )
            if entry.dtype == np.uint8 and len(entry.shape) == 3 and not _is_image_space(entry):
                raise UserError(
                    f"gym:{self._name} cannot be used: an image must be (height, width, 3), not "
                    f"{entry.shape}; wrap the environment."
                )
        return entries

    def _entries(self, observation: Any) -> dict[str, Any]:
        return observation if isinstance(observation, dict) else {"": observation}

    def _action_bounds(self) -> tuple[np.ndarray, np.ndarray]:
        space = self._env.action_space
        if not isinstance(space, spaces.Box):
            raise UserError(
                f"gym:{self._name} cannot be used: its actions are {type(space).__name__}, "
                "and only Box is supported."
            )
        if not space.is_bounded():
            raise UserError(
                f"gym:{self._name} cannot be used: its actions have no bounds. Wrap it in "
                "gymnasium.wrappers.RescaleAction, or give its Box finite limits."
            )
        return space.low.reshape(-1).astype(float), space.high.reshape(-1).astype(float)

    def _find_image_space(self, entries: dict[str, spaces.Space]) -> spaces.Box:
        if self._image_key is not None:
            shape = entries[self._image_key].shape
            assert shape is not None  # of an image space
            return image_space(*shape[:2])
        self._env.reset(seed=0)
        return image_space(*self._render().shape[:2])

    def _own_image(self) -> np.ndarray:
        assert self._image_key is not None  # else :meth:`_render` makes the image
        return np.asarray(self._observation[self._image_key])

    def _render(self) -> np.ndarray:
        try:
            frame = self._env.render()
        except gymnasium.error.DependencyNotInstalled as error:
            raise UserError(f"Drawing gym:{self._name} needs another package: {error}.") from error
        if not isinstance(frame, np.ndarray) or not is_image(frame.shape, frame.dtype):
            raise UserError(
                f"gym:{self._name} does not draw: render() must return a uint8 array "
                "(height, width, 3) in render mode rgb_array."
            )
        return frame
