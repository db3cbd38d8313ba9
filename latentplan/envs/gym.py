"""Gymnasium environments (1.1 or later), as simulators."""

from __future__ import annotations

import enum
import inspect
import math
import os
import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from latentplan.envs import rendering
from latentplan.envs.action_spaces import actions_of
from latentplan.envs.isolation import seed_global_generators
from latentplan.envs.modules import import_module
from latentplan.envs.observations import (
    IMAGE_AXES,
    ObservationError,
    entries_of,
    image_size_of,
    read,
    size_of,
)
from latentplan.envs.simulator import FILM_SIZE, FRAME_SECONDS, image_space, vector_space
from latentplan.types import UserError, shown

_VALUES = {  # of Gymnasium's methods
    "reset": ("observation", "info"),
    "step": ("observation", "reward", "terminated", "truncated", "info"),
}


def build(
    name: str,
    obs: str,
    module: str,
    image_size: int,
    renderer: rendering.Renderer | None,
    arguments: Mapping[str, Any] = MappingProxyType({}),
    film: bool = False,
) -> GymEnvironment:
    """Build the environment with the registered id ``name``.

    Args:
        obs: ``pixels``, ``state`` or ``both``.
        module: a module name or a .py file, which is imported first; empty: none.
        image_size: pixels per side of the frames that a MuJoCo environment draws.
        renderer: how MuJoCo draws; None where the environment draws without OpenGL.
        arguments: for ``gymnasium.make``.
        film: whether `draw` will be called.
    """
    if renderer is not None:  # before MuJoCo is imported
        os.environ.update(rendering.environment_variables(renderer))
    # What an import or a constructor draws at random is the same in every worker.
    seed_global_generators(0)
    if module:
        import_module(module)
    return GymEnvironment(name, obs, image_size, renderer, arguments, film)


def _takes_frame_size(env: gymnasium.Env) -> bool:
    """Whether an environment draws with Gymnasium's MuJoCo renderer, in a size that it can be told.

    The width and height of another environment may be those of its world.
    """
    mujoco_env = sys.modules.get("gymnasium.envs.mujoco.mujoco_env")
    kind = type(env.unwrapped)
    if mujoco_env is None or not issubclass(kind, mujoco_env.MujocoEnv) or env.spec is None:
        return False
    if inspect.isfunction(env.spec.entry_point) or {"width", "height"} & set(env.spec.kwargs):
        return False
    # Down to the class whose parameters they are.
    for initialize in (vars(base)["__init__"] for base in kind.__mro__ if "__init__" in vars(base)):
        parameters = inspect.signature(initialize).parameters
        if {"width", "height"} <= set(parameters):
            return True
        if all(x.kind is not inspect.Parameter.VAR_KEYWORD for x in parameters.values()):
            return False
    return False


def _of_size(renderer: Any, size: int) -> Any:
    """Another MuJoCo renderer of Gymnasium with the same camera, and images (size, size, 3)."""
    return type(renderer)(
        renderer.model,
        renderer.data,
        renderer.default_cam_config,
        size,
        size,
        renderer.max_geom,
        renderer.camera_id,
    )


def _success(info: Any) -> bool | None:
    """What an environment says about success, under either of its usual names."""
    for name in ("success", "is_success"):
        if isinstance(info, Mapping) and isinstance(
            info.get(name), bool | int | float | np.generic
        ):
            return bool(info[name])
    return None


def _number(name: str, value: Any) -> float:
    """A number, which an environment may return as an array of one element."""
    try:
        return float(np.asarray(value).reshape(()))
    except (TypeError, ValueError):
        raise UserError(
            f"The environment returned a {name} that is not one number, but {shown(value)}."
        ) from None


class GymEnvironment:
    """A Gymnasium environment; see `latentplan.envs.simulator.Simulator`.

    Its observations are used as `latentplan.envs.observations` says. Where they have no image of
    their own, the image is the result of ``render()``. It has its own size; the parent process
    resizes it.
    """

    def __init__(
        self,
        name: str,
        obs: str,
        image_size: int,
        renderer: rendering.Renderer | None,
        arguments: Mapping[str, Any],
        film: bool = False,
    ) -> None:
        self.success: bool | None = None
        self._film_renderer: Any = None  # of MuJoCo
        self._name, self._arguments = name, {"disable_env_checker": True, **arguments}
        self._env = self._make({})
        try:
            self.entries = entries_of(self._env.observation_space, obs)
            self.actions = actions_of(self._env.action_space, self._action_meanings())
        except UserError as error:
            raise UserError(f"gym:{name} cannot be used: {error}") from error
        own_size = image_size_of(self.entries)
        self._draws = obs in ("pixels", "both") and own_size is None
        modes = self._env.metadata.get("render_modes") or ()
        self._renders = self._draws or (film and "rgb_array" in modes)
        if self._renders:
            self._make_drawing(image_size, renderer, film)
        parts: dict[str, spaces.Space[Any]] = {}
        if obs in ("pixels", "both"):
            parts["image"] = image_space(*(own_size or self._size_of_frames()))
        if obs in ("state", "both"):
            numbers = [size_of(entry) for entry in self.entries if entry.use not in IMAGE_AXES]
            parts["vector"] = vector_space(sum(numbers))
        self.observation_space = spaces.Dict(parts)
        self._observation: Any = None

    def reset(self, seed: int, episode: int) -> None:
        seed %= 2**31  # some environments refuse larger seeds
        seed_global_generators(seed)
        for env in (self._env, self._env.unwrapped):  # their spaces may differ
            env.action_space.seed(seed)
            env.observation_space.seed(seed)
        self._observation, _ = self._values("reset", self._env.reset(seed=seed))
        self.success = None

    def advance(self, action: np.ndarray) -> tuple[float, bool, bool]:
        values = self._values("step", self._env.step(action))
        self._observation, reward, terminated, truncated, info = values
        self.success = _success(info)
        return (
            _number("reward", reward),
            bool(_number("terminated", terminated)),
            bool(_number("truncated", truncated)),
        )

    def observe(self) -> dict[str, np.ndarray]:
        try:
            observation = read(self.entries, self._observation)
        except ObservationError as error:
            raise UserError(f"The environment returned {error}.") from error
        return observation | ({"image": self._render()} if self._draws else {})

    def draw(self) -> np.ndarray:
        if not self._renders:
            pictures = entries_of(self._env.observation_space, "pixels")
            if pictures:
                return read(pictures, self._observation)["image"]
            raise UserError(
                f"gym:{self._name} cannot be drawn: it has no render mode rgb_array, and observes "
                "no image."
            )
        if self._film_renderer is None:
            return self._render()
        self._enter_mujoco_context(self._film_renderer)
        return np.asarray(self._film_renderer.render("rgb_array"))

    @property
    def frame_seconds(self) -> float:
        # Gymnasium has no name for the time step. Its own physics environments call it `dt`.
        for value in (getattr(self._env.unwrapped, "dt", None), self._frame_rate()):
            if isinstance(value, int | float) and 0 < value < math.inf:
                return float(value)
        return FRAME_SECONDS

    def close(self) -> None:
        own = getattr(self._env.unwrapped, "mujoco_renderer", None)
        for renderer in (self._film_renderer, own):
            viewer = self._enter_mujoco_context(renderer)
            if viewer is not None:
                viewer.con.free()  # later it would free what another context has so named
        if self._film_renderer is not None:
            self._film_renderer.close()
        self._env.close()

    def _frame_rate(self) -> float | None:
        """Seconds per frame by the rate that the environment declares for films."""
        rate = self._env.metadata.get("render_fps")
        return 1 / rate if isinstance(rate, int | float) and rate > 0 else None

    def _make(self, arguments: dict[str, Any]) -> gymnasium.Env:
        try:
            return gymnasium.make(self._name, **(self._arguments | arguments))
        except gymnasium.error.UnregisteredEnv as error:
            raise UserError(
                f"Gymnasium has no environment {self._name!r} ({error}). "
                "Your own environment needs env.module=FILE.py, a file that registers it."
            ) from error
        except (gymnasium.error.DependencyNotInstalled, ModuleNotFoundError) as error:
            raise UserError(f"gym:{self._name} needs another package: {error}.") from error

    def _make_drawing(
        self, image_size: int, renderer: rendering.Renderer | None, film: bool
    ) -> None:
        """Build the environment anew, so that it draws itself.

        MuJoCo draws the agent's images and the pictures of a film in different sizes.
        """
        drawn_by_mujoco = _takes_frame_size(self._env)
        self._env.close()
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame without a display
        # Not every environment takes a render_mode, so it is passed only where it is needed.
        arguments: dict[str, Any] = {"render_mode": "rgb_array"}
        if drawn_by_mujoco:
            arguments |= {"width": image_size, "height": image_size}
        self._env = self._make(arguments)
        if drawn_by_mujoco and renderer is not None:
            env: Any = self._env.unwrapped
            rendering.tune_model(env.model, renderer.quality, image_size)
            if film:
                rendering.enlarge_buffer(env.model, max(image_size, FILM_SIZE))
                self._film_renderer = _of_size(env.mujoco_renderer, FILM_SIZE)

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

    def _action_meanings(self) -> Sequence[object]:
        """The names of discrete actions, from Atari's method or from MiniGrid's enumeration."""
        meanings = getattr(self._env.unwrapped, "get_action_meanings", None)
        if callable(meanings):
            return meanings()
        actions = getattr(self._env.unwrapped, "actions", None)
        if isinstance(actions, type) and issubclass(actions, enum.IntEnum):
            return [action.name for action in sorted(actions)]
        return ()

    def _size_of_frames(self) -> tuple[int, int]:
        self._env.reset(seed=0)
        height, width = self._render().shape[:2]
        return height, width

    @staticmethod
    def _enter_mujoco_context(renderer: Any) -> Any:
        """Make the OpenGL context of Gymnasium's MuJoCo renderer current; return its viewer.

        The renderer assumes that no other one of this process draws. None: it is not used.
        """
        viewer = getattr(renderer, "viewer", None)
        if viewer is not None:
            viewer.make_context_current()
        return viewer

    def _render(self) -> np.ndarray:
        self._enter_mujoco_context(getattr(self._env.unwrapped, "mujoco_renderer", None))
        try:
            frame = self._env.render()
        except gymnasium.error.DependencyNotInstalled as error:
            raise UserError(f"Drawing gym:{self._name} needs another package: {error}.") from error
        if not isinstance(frame, np.ndarray) or frame.dtype != np.uint8 or frame.shape[2:] != (3,):
            raise UserError(
                f"gym:{self._name} does not draw: render() must return a uint8 array "
                "(height, width, 3) in render mode rgb_array."
            )
        return frame
