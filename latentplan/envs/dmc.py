"""The tasks of the DeepMind Control Suite, as simulators.

dm_control opens its display when it is imported. Only `build` imports it, after the environment
variables that name the renderer have been set.
"""

from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType
from typing import Any

import numpy as np
from gymnasium import spaces

from latentplan.config.tasks import split_dmc
from latentplan.envs import rendering
from latentplan.envs.actions import Actions
from latentplan.envs.simulator import FILM_SIZE, flatten_state, image_space, vector_space
from latentplan.types import Entry, UserError, shown

# A random model (lqr) is the same in every run and every worker. Episodes take their randomness
# from the seed of `reset`.
_MODEL_SEED = 0
_UNLIMITED = 1e9  # dm_control writes 1e10 for an actuator without limits


def build(
    name: str,
    obs: str,
    image_size: int,
    renderer: rendering.Renderer | None,
    camera: str = "",
    film: bool = False,
) -> ControlSuite:
    """Build a task.

    Args:
        name: as `parse_task` returns it.
        renderer: may be None only if ``obs`` is ``state`` and no film is made.
        camera: its name or number; empty: the usual one.
        film: whether `draw` will be called.

    Raises:
        UserError: there is no such camera.
    """
    drawn = film or obs != "state"
    if drawn and renderer is None:
        raise ValueError("pixels need a renderer")
    return ControlSuite(name, obs, image_size, renderer if drawn else None, camera, film)


def import_suite(renderer: rendering.Renderer | None) -> ModuleType:
    """Import ``dm_control.suite`` for a renderer; without one, no display is opened."""
    loaded = sys.modules.get("dm_control._render")
    if loaded is None:
        _import_quietly(renderer)
    elif renderer is not None and renderer.backend != loaded.BACKEND:
        if loaded.BACKEND not in (None, "off"):
            raise UserError(
                f"This process already draws with {loaded.BACKEND} and cannot change to "
                f"{renderer.backend}: use env.workers=true, or the same renderer."
            )
        os.environ.update(rendering.environment_variables(renderer))
        importlib.reload(loaded)  # it was imported for state vectors, without a renderer
    return importlib.import_module("dm_control.suite")


def _import_quietly(renderer: rendering.Renderer | None) -> None:
    from absl import logging

    logging.set_verbosity(logging.ERROR)  # every walker warns of a deprecated XML attribute
    if renderer is not None:
        os.environ.update(rendering.environment_variables(renderer))
        importlib.import_module("dm_control.suite")
        return
    before = os.environ.get("MUJOCO_GL")
    os.environ["MUJOCO_GL"] = "disabled"
    try:
        importlib.import_module("dm_control.suite")
    finally:  # another library of this process may draw later
        del os.environ["MUJOCO_GL"]
        if before is not None:
            os.environ["MUJOCO_GL"] = before


class ControlSuite:
    """One task of the suite; see `latentplan.envs.simulator.Simulator`.

    The vector holds all entries of dm_control's observation, in the order of their names. The image
    is the view of camera 0, or of camera 2 for the quadruped, whose camera 0 does not follow it.
    """

    success = None
    entries: tuple[Entry, ...] = ()

    def __init__(
        self,
        name: str,
        obs: str,
        image_size: int,
        renderer: rendering.Renderer | None,
        camera: str = "",
        film: bool = False,
    ) -> None:
        suite = import_suite(renderer)
        domain, task = split_dmc(name)
        self._env = suite.load(domain, task, task_kwargs={"random": _MODEL_SEED})
        self._size = image_size
        self._camera_id = self._find_camera(camera) if camera else 2 * (domain == "quadruped")
        self._cameras: dict[int, Any] = {}  # by the size of their images
        self.frame_seconds = float(self._env.control_timestep())
        self._quality = renderer.quality if renderer else ""
        physics = self._env.physics
        if renderer is None:
            # quadruped_escape reads the contexts at every reset and accepts that there are none.
            physics._make_rendering_contexts = lambda: None
        else:
            rendering.tune_model(physics.model, self._quality, image_size)
        if film:
            rendering.enlarge_buffer(physics.model, max(image_size, FILM_SIZE))
        bounds = self._env.action_spec()
        limited = bounds.maximum < _UNLIMITED
        low = np.where(limited, bounds.minimum, -1.0)
        high = np.where(limited, bounds.maximum, 1.0)
        self.actions = Actions(tuple(low.tolist()), tuple(high.tolist()))
        parts: dict[str, spaces.Space[Any]] = {}
        if obs in ("pixels", "both"):
            parts["image"] = image_space(image_size, image_size)
        if obs in ("state", "both"):
            shapes = [spec.shape for spec in self._env.observation_spec().values()]
            parts["vector"] = vector_space(sum(int(np.prod(shape)) for shape in shapes))
        self.observation_space = spaces.Dict(parts)
        self._state: dict[str, Any] = {}

    def _find_camera(self, camera: str) -> int:
        model = self._env.physics.model
        names = [model.id2name(i, "camera") for i in range(model.ncam)]
        if camera in names:
            return names.index(camera)
        if camera.isascii() and camera.isdigit() and int(camera) < len(names):
            return int(camera)
        known = ", ".join(f"{i} ({name})" if name else f"{i}" for i, name in enumerate(names))
        raise UserError(f"env.camera={shown(camera, quoted=False)} does not exist: use {known}.")

    def reset(self, seed: int, episode: int) -> None:
        # The task draws everything from this generator. A new one makes the episode independent of
        # earlier ones.
        self._env.task._random = np.random.RandomState(seed)
        self._state = self._env.reset().observation

    def advance(self, action: np.ndarray) -> tuple[float, bool, bool]:
        step = self._env.step(action)
        self._state = step.observation
        terminated = step.last() and step.discount == 0
        return float(step.reward), bool(terminated), bool(step.last() and not terminated)

    def snapshot(self) -> np.ndarray:
        """The state of the physics, to which `restore` can return."""
        return self._env.physics.get_state().copy()

    def restore(self, state: np.ndarray) -> None:
        """Return the physics to ``state``. The time limit starts again."""
        with self._env.physics.reset_context():
            self._env.physics.set_state(state)
        self._env._step_count, self._env._reset_next_step = 0, False
        self._state = self._env.task.get_observation(self._env.physics)

    def observe(self) -> dict[str, np.ndarray]:
        observation = {}
        if "image" in self.observation_space.spaces:
            observation["image"] = self.render()
        if "vector" in self.observation_space.spaces:
            observation["vector"] = flatten_state(self._state)
        return observation

    def draw(self) -> np.ndarray:
        return self._render(FILM_SIZE)

    def render(self) -> np.ndarray:
        """The present frame, (size, size, 3) uint8."""
        return self._render(self._size)

    def _render(self, size: int) -> np.ndarray:
        if size not in self._cameras:
            from dm_control.mujoco import engine

            # One camera is kept, because physics.render() builds a scene for every frame.
            self._cameras[size] = engine.Camera(self._env.physics, size, size, self._camera_id)
        return np.array(self._cameras[size].render())

    def describe_renderer(self) -> str:
        """The driver's name (GL_RENDERER); `render` must have been called before."""
        from OpenGL import GL

        with self._env.physics.contexts.gl.make_current() as context:
            return context.call(GL.glGetString, GL.GL_RENDERER).decode()

    def close(self) -> None:
        for camera in self._cameras.values():
            camera._scene.free()
        self._cameras.clear()
        self._env.physics.free()  # while its rendering thread still runs
