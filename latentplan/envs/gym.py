"""Gymnasium environments (1.1 or later) with Box actions, as simulators."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from latentplan.envs import rendering
from latentplan.envs.modules import import_module
from latentplan.envs.simulator import flatten_state, image_space, is_image, vector_space
from latentplan.types import UserError, shown

_VALUES = {  # of Gymnasium's methods
    "reset": ("observation", "info"),
    "step": ("observation", "reward", "terminated", "truncated", "info"),
}


def build(
    name: str, obs: str, module: str, image_size: int, renderer: rendering.Renderer | None
) -> GymEnvironment:
    """Build the environment with the registered id ``name``.

    Args:
        obs: ``pixels``, ``state`` or ``both``.
        module: a module name or a .py file, which is imported first; empty: none.
        image_size: pixels per side of the frames that a MuJoCo environment draws.
        renderer: how MuJoCo draws; None where the environment draws without OpenGL.
    """
    if renderer is not None:  # before MuJoCo is imported
        os.environ.update(rendering.environment_variables(renderer))
    if module:
        import_module(module)
    return GymEnvironment(name, obs, image_size, renderer)


def _is_image_space(space: spaces.Space) -> bool:
    return isinstance(space, spaces.Box) and is_image(space.shape, space.dtype)


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

    The vector holds the numbers of the observation, the entries of a Dict in the order of their
    names. The image is the observation's own uint8 (h, w, 3) entry where there is one, else the
    result of ``render()``. It has its own size; the parent process resizes it.
    """

    def __init__(
        self, name: str, obs: str, image_size: int, renderer: rendering.Renderer | None
    ) -> None:
        self._name = name
        self._env = self._make({})
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
        if self._draws:
            drawn_by_mujoco = _takes_frame_size(self._env)
            self._env.close()
            os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame without a display
            # Not every environment takes a render_mode, so it is passed only where it is needed.
            arguments: dict[str, Any] = {"render_mode": "rgb_array"}
            if drawn_by_mujoco:
                arguments |= {"width": image_size, "height": image_size}
            self._env = self._make(arguments)
            if drawn_by_mujoco and renderer is not None:
                model: Any = self._env.unwrapped
                rendering.tune_model(model.model, renderer.quality, image_size)
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
        self._observation = self._entries(observation)

    def advance(self, action: np.ndarray) -> tuple[float, bool, bool]:
        space = self._env.action_space
        action = action.reshape(space.shape).astype(space.dtype)
        values = self._values("step", self._env.step(action))
        observation, reward, terminated, truncated, _ = values
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

    def close(self) -> None:
        viewer = self._enter_mujoco_context()
        if viewer is not None:
            viewer.con.free()  # later it would free what another context has under the same names
        self._env.close()

    def _make(self, arguments: dict[str, Any]) -> gymnasium.Env:
        try:
            return gymnasium.make(self._name, disable_env_checker=True, **arguments)
        except gymnasium.error.UnregisteredEnv as error:
            raise UserError(
                f"Gymnasium has no environment {self._name!r} ({error}). "
                "Your own environment needs env.module=FILE.py, a file that registers it."
            ) from error
        except (gymnasium.error.DependencyNotInstalled, ModuleNotFoundError) as error:
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

    def _enter_mujoco_context(self) -> Any:
        """Make the OpenGL context of Gymnasium's MuJoCo renderer current; return its viewer.

        The renderer assumes that no other environment of this process draws. None: it is not used.
        """
        viewer = getattr(getattr(self._env.unwrapped, "mujoco_renderer", None), "viewer", None)
        if viewer is not None:
            viewer.make_context_current()
        return viewer

    def _render(self) -> np.ndarray:
        self._enter_mujoco_context()
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
