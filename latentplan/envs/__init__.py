"""Environments: they turn the name of a task into rows of experience.

Worker processes import this package. It therefore never imports torch, and imports dm_control only
inside a simulator.
"""

from __future__ import annotations

from collections.abc import Sequence

from latentplan.config.schema import Config, EnvConfig
from latentplan.config.tasks import has_environment, parse_task
from latentplan.config.validation import check_bounds
from latentplan.envs.faults import TooManyFaultsError
from latentplan.envs.rendering import Renderer, choose_renderer
from latentplan.envs.simulator import MODES
from latentplan.envs.vector import StepInterruptedError, VectorEnv
from latentplan.envs.workers import Recipe
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
    "needs_renderer",
    "parse_task",
    "pick_renderer",
]

_OBS = ("pixels", "state", "both")


def needs_renderer(task: str, obs: str, film: bool = False) -> bool:
    """Whether the task is drawn with OpenGL, so that a renderer must be chosen."""
    return parse_task(task)[0] == "dmc" and (film or obs != "state")


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
        renderer: chosen here where images need one and none is given.
        first_episodes: (num_envs,) number of episodes that earlier sessions have begun.
        film: whether `VectorEnv.draw` will be called.

    Raises:
        UserError: the task or a setting is invalid, or the task cannot be built or drawn.
    """
    suite, name = parse_task(task)
    if not has_environment(task):
        raise UserError(f"task={task} has no environment, and this needs one.")
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
    if not needs_renderer(task, obs, film):
        renderer = None
    elif renderer is None:
        renderer = choose_renderer(env.renderer, env.render_quality)
    recipe = Recipe(f"{suite}:{name}", obs, env.image_size, env.module, renderer, film)
    return VectorEnv(
        recipe, env, num_envs=num_envs, seed=seed, mode=mode, first_episodes=first_episodes
    )


def pick_renderer(config: Config, film: bool = False) -> Renderer | None:
    """The renderer for the images and films of a run; None where OpenGL draws none."""
    if not needs_renderer(config.task, config.obs, film):
        return None
    return choose_renderer(config.env.renderer, config.env.render_quality)


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
