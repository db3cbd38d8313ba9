"""Gymnasium environments (1.1 or later) with Box actions, as simulators."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import math
import os
import sys
from collections.abc import Mapping, Sequence
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from latentplan.envs.simulator import (
    FRAME_SECONDS,
    flatten_state,
    image_space,
    is_image,
    vector_space,
)
from latentplan.types import UserError, shown

_VALUES = {  # of Gymnasium's methods
    "reset": ("observation", "info"),
    "step": ("observation", "reward", "terminated", "truncated", "info"),
}


def build(name: str, obs: str, module: str, film: bool = False) -> GymEnvironment:
    """Build the environment with the registered id ``name``.

    Args:
        obs: ``pixels``, ``state`` or ``both``.
        module: a module name or a .py file, which is imported first; empty: none.
        film: whether `draw` will be called.
    """
    if module:
        import_module(module)
    return GymEnvironment(name, obs, film)


def import_module(module: str) -> None:
    """Import the module or file that registers a user's environments.

    A file can import its neighbours by their names, as in ``python FOLDER/file.py``.

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
        loader = _FromSource(name, str(path))
        spec = importlib.util.spec_from_file_location(name, path, loader=loader)
        if spec is None:
            raise ImportError(f"{path} cannot be imported")
        loaded = importlib.util.module_from_spec(spec)
        sys.modules[name] = loaded  # pickle looks up the classes of the module there
        if str(path.parent) not in sys.path:
            sys.path.insert(0, str(path.parent))
        try:
            loader.exec_module(loaded)
        except BaseException:
            del sys.modules[name]
            raise
    except Exception as error:  # a user's code may raise any exception
        raise UserError(
            f"env.module={module} could not be imported: {type(error).__name__}: {error}"
        ) from error


class _FromSource(SourceFileLoader):
    """Compiles a file each time it is imported.

    Compiled code in ``__pycache__`` beside the file may say anything, and only the file is compared
    with the record of trusted files.
    """

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        return self.source_to_code(self.get_data(path), path)


def _is_image_space(space: spaces.Space) -> bool:
    return isinstance(space, spaces.Box) and is_image(space.shape, space.dtype)


def _number(name: str, value: Any) -> float:
    """A number, which an environment may return as an array of one element."""
    try:
        return float(np.asarray(value).reshape(()))
    except (TypeError, ValueError):
        raise UserError(
            f"The environment returned a {name} that is not one number, but {shown(value)}."
        ) from None


def _success(info: Any) -> bool | None:
    """What an environment says about success, under either of its usual names."""
    for name in ("success", "is_success"):
        if isinstance(info, Mapping) and isinstance(
            info.get(name), bool | int | float | np.generic
        ):
            return bool(info[name])
    return None


class GymEnvironment:
    """A Gymnasium environment; see `latentplan.envs.simulator.Simulator`.

    The vector holds the numbers of the observation, the entries of a Dict in the order of their
    names. The image is the observation's own uint8 (h, w, 3) entry where there is one, else the
    result of ``render()``. It has its own size; the parent process resizes it.
    """

    def __init__(self, name: str, obs: str, film: bool = False) -> None:
        self._name = name
        self.success: bool | None = None
        self._env = self._make(None)
        entries = self._entries_of_space(self._env.observation_space)
        images = [key for key, space in entries.items() if _is_image_space(space)]
        if len(images) > 1:
            raise UserError(
                f"gym:{name} observes several images ({', '.join(images)}): wrap it so that one "
                "is left."
            )
        self._entry_keys = list(entries)
        self._state_keys = [key for key in entries if key not in images]
        self._image_key = images[0] if images else None
        self._draws = obs in ("pixels", "both") and self._image_key is None
        modes = self._env.metadata.get("render_modes") or ()
        self._renders = self._draws or (film and "rgb_array" in modes)
        if self._renders:
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
        observation, _ = self._values("reset", self._env.reset(seed=seed))
        self._observation, self.success = self._entries(observation), None

    def advance(self, action: np.ndarray) -> tuple[float, bool, bool]:
        space = self._env.action_space
        action = action.reshape(space.shape).astype(space.dtype)
        values = self._values("step", self._env.step(action))
        observation, reward, terminated, truncated, info = values
        self.success = _success(info)
        self._observation = self._entries(observation)
        return (
            _number("reward", reward),
            bool(_number("terminated", terminated)),
            bool(_number("truncated", truncated)),
        )

    def observe(self) -> dict[str, np.ndarray]:
        observation = {}
        if "image" in self.observation_space.spaces:
            observation["image"] = self._render() if self._draws else self._own_image()
        if "vector" in self.observation_space.spaces:
            observation["vector"] = self._flat_state()
        return observation

    def draw(self) -> np.ndarray:
        if self._renders:
            return self._render()
        if self._image_key is not None:
            return self._own_image()
        raise UserError(
            f"gym:{self._name} cannot be drawn: it has no render mode rgb_array, and observes no "
            "image."
        )

    @property
    def frame_seconds(self) -> float:
        # Gymnasium has no name for the time step. Its own physics environments call it `dt`.
        for value in (getattr(self._env.unwrapped, "dt", None), self._frame_rate()):
            if isinstance(value, int | float) and 0 < value < math.inf:
                return float(value)
        return FRAME_SECONDS

    def close(self) -> None:
        self._env.close()

    def _frame_rate(self) -> float | None:
        """Seconds per frame by the rate that the environment declares for films."""
        rate = self._env.metadata.get("render_fps")
        return 1 / rate if isinstance(rate, int | float) and rate > 0 else None

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

    def _values(self, method: str, result: Any) -> Sequence[Any]:
        """The values that ``method`` returned, if their number is that of Gymnasium."""
        names = _VALUES[method]
        count = len(result) if isinstance(result, tuple | list) else 1
        if count != len(names):
            raise UserError(
                f"The environment's {method} returned {count} value{'s' * (count > 1)}, and "
                f"Gymnasium's {method} returns {len(names)}: {', '.join(names)}."
            )
        return result

    def _entries(self, observation: Any) -> dict[str, Any]:
        entries = observation if isinstance(observation, Mapping) else {"": observation}
        for key in self._entry_keys:
            if key not in entries:
                raise UserError(f"The environment returned an observation without {key!r}.")
        return dict(entries)

    def _flat_state(self) -> np.ndarray:
        states = {key: self._observation[key] for key in self._state_keys}
        try:
            return flatten_state(states)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"The environment returned an observation that is not numbers: {error}."
            ) from error

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
