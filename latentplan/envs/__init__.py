"""Environments: they turn the name of a task into rows of experience.

Worker processes import this package. It therefore never imports torch, and imports dm_control only
inside a simulator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from latentplan.config.schema import Config, EnvConfig
from latentplan.config.tasks import has_environment, parse_task
from latentplan.config.validation import check_bounds
from latentplan.envs.faults import TooManyFaultsError
from latentplan.envs.rendering import Renderer, choose_renderer
from latentplan.envs.simulator import MODES
from latentplan.envs.vector import StepInterruptedError, VectorEnv
from latentplan.envs.workers import Recipe, fails_without_opengl
from latentplan.types import UserError

__all__ = [
    "Renderer",
    "StepInterruptedError",
    "TooManyFaultsError",
    "VectorEnv",
    "choose_renderer",
    "has_environment",
    "make_env",
    "make_eval_env",
    "make_train_env",
    "make_vector",
    "may_need_renderer",
    "parse_task",
    "pick_renderer",
]

_OBS = ("pixels", "state", "both")


def may_need_renderer(task: str, obs: str, film: bool = False) -> bool:
    """Whether the task may be drawn with OpenGL. It is decided without building the task."""
    suite, _ = parse_task(task)
    return suite == "gym" or (suite == "dmc" and (film or obs != "state"))


def _renderer_for(recipe: Recipe, env: EnvConfig) -> Renderer | None:
    """The renderer that a task needs, or None if it draws nothing with OpenGL.

    A Gymnasium environment is built and drawn once to find out, in a process where MuJoCo has no
    renderer.

    Args:
        recipe: with None as its renderer.
        env: its settings.

    Raises:
        UserError: no renderer works, or the environment cannot be built.
    """
    if not may_need_renderer(recipe.task, recipe.obs, recipe.film):
        return None
    if recipe.task.startswith("gym:"):
        if not env.workers and recipe.obs == "state" and not recipe.film:
            return None  # another process would cost more than is gained
        try:
            if not fails_without_opengl(recipe, env.timeout):
                return None
        except UserError:
            if env.workers:
                raise
            return None  # an environment may be registered in this process alone
    return choose_renderer(env.renderer, env.render_quality)


def _recipe(task: str, obs: str, env: EnvConfig, film: bool) -> Recipe:
    suite, name = parse_task(task)
    if env.kwargs and suite != "gym":
        raise UserError(f"env.kwargs are arguments of gym: environments, and {task} has none.")
    if env.camera and suite != "dmc":
        raise UserError(
            f"env.camera is for dm_control tasks, not for {task}: a gym: environment takes "
            "arguments instead, such as env.kwargs.camera_name=track."
        )
    kwargs = tuple((key, _hashable(value)) for key, value in env.kwargs.items())
    task = f"{suite}:{name}"
    return Recipe(task, obs, env.image_size, env.module, None, film, kwargs, env.camera)


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, list | tuple) else value


def make_vector(
    task: str,
    obs: str,
    env: EnvConfig,
    *,
    num_envs: int,
    seed: int,
    mode: str = "train",
    renderer: Renderer | None = None,
    first_episodes: Sequence[int] | None = None,
    film: bool = False,
) -> VectorEnv:
    """Build environments of a task.

    In training, episode k of environment i starts from a seed that depends only on ``(seed, i,
    k)``. In evaluation, the k-th episode that any of them begins depends only on ``(seed, k)``.

    Args:
        task: any spelling that `parse_task` knows.
        obs: ``pixels``, ``state`` or ``both``: the rows' ``image`` (uint8, size x size x 3) and
            ``vector`` (float32).
        mode: ``train`` or ``eval``; the seeds of the two modes are disjoint.
        renderer: chosen here where the task needs one and none is given.
        first_episodes: (num_envs,) number of episodes that earlier sessions have begun.
        film: whether `VectorEnv.draw` will be called.

    Raises:
        UserError: the task or a setting is invalid, or the task cannot be built or drawn.
    """
    if not has_environment(task):
        raise UserError(f"task={task} has no environment, and this needs one.")
    recipe = _recipe(task, obs, env, film)
    if obs not in _OBS:
        raise UserError(f"obs={obs} is unknown; use pixels, state or both.")
    if mode not in MODES:
        raise ValueError(f"mode must be train or eval, got {mode!r}")
    for key, value in (
        ("seed", seed),
        ("env.repeat", env.repeat),
        ("env.episode_frames", env.episode_frames),
        ("env.image_size", env.image_size),
        ("env.num_envs", num_envs),
        ("env.timeout", env.timeout),
        ("env.max_faults", env.max_faults),
    ):
        check_bounds(key, value)
    if first_episodes is not None and len(first_episodes) != num_envs:
        raise ValueError(f"first_episodes has {len(first_episodes)} entries for {num_envs}")
    if not may_need_renderer(task, obs, film):
        renderer = None
    elif renderer is None:
        renderer = _renderer_for(recipe, env)
    recipe = replace(recipe, renderer=renderer)
    return VectorEnv(
        recipe, env, num_envs=num_envs, seed=seed, mode=mode, first_episodes=first_episodes
    )


def pick_renderer(config: Config, film: bool = False) -> Renderer | None:
    """The renderer for the images and films of a run; None where nothing is drawn with OpenGL.

    Raises:
        UserError: no renderer works, or a Gymnasium environment cannot be built.
    """
    if not has_environment(config.task):
        return None
    return _renderer_for(_recipe(config.task, config.obs, config.env, film), config.env)


def make_train_env(
    config: Config, renderer: Renderer | None, first_episodes: Sequence[int] | None = None
) -> VectorEnv:
    """The environments of training; ``first_episodes`` as of :func:`make_vector`."""
    return make_vector(
        config.task,
        config.obs,
        config.env,
        num_envs=config.env.num_envs,
        seed=config.seed,
        renderer=renderer,
        first_episodes=first_episodes,
    )


def make_eval_env(
    config: Config, renderer: Renderer | None, num_envs: int, seed: int, film: bool = False
) -> VectorEnv:
    """Environments whose episodes never occur in training, for any seed.

    ``film`` as of :func:`make_vector`.
    """
    return make_vector(
        config.task,
        config.obs,
        config.env,
        num_envs=num_envs,
        seed=seed,
        mode="eval",
        renderer=renderer,
        film=film,
    )


def make_env(config: Config, *, num_envs: int = 1, seed: int = 0) -> VectorEnv:
    """The environments of :func:`make_eval_env`, with the renderer that the configuration asks for.

    Args:
        config: for example that of a loaded agent, ``latentplan.load(run).config``.

    Raises:
        UserError: the task cannot be built, or no renderer works.
    """
    return make_eval_env(config, pick_renderer(config), num_envs, seed)
