"""A film that compares an imagined rollout with the environment under the same actions."""

from __future__ import annotations

import logging
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from latentplan.agent import Agent
from latentplan.behavior.imagination import imagine
from latentplan.config.schema import Config
from latentplan.envs import (
    Renderer,
    VectorEnv,
    make_eval_env,
    may_need_renderer,
    pick_renderer,
)
from latentplan.envs.simulator import Picture
from latentplan.inspection.action_names import action_texts
from latentplan.inspection.canvas import IMAGINED, Charts, Line
from latentplan.inspection.entries import end_chart, entry_charts
from latentplan.inspection.film import PICTURE_WIDTH, make_comparison_film, make_film
from latentplan.inspection.imagined_rollouts import (
    after_real_state,
    headers_after_real_state,
    mean_action,
)
from latentplan.inspection.open_loop import decode, to_numpy
from latentplan.nn.distributions import symlog
from latentplan.runs.stamp import TEXT
from latentplan.types import Timestep, UserError, join

log = logging.getLogger("latentplan")


class Env(Protocol):
    """The part of :class:`latentplan.envs.vector.VectorEnv` that this module needs."""

    is_last: np.ndarray

    def reset(self) -> tuple[Timestep, Any]: ...

    def step(self, action: np.ndarray) -> tuple[Timestep, Any]: ...

    def draw(self, i: int) -> Picture: ...


def make_film_env(
    config: Config,
    renderer: Renderer | None,
    num_envs: int,
    seed: int,
    *,
    beside_training: bool,
) -> tuple[VectorEnv, bool]:
    """Evaluation environments for :func:`make_dream_against_reality_film`.

    Args:
        config: the configuration of the run.
        renderer: that of the agent's images, or None if it sees none.
        num_envs, seed: as of :func:`latentplan.envs.make_eval_env`.
        beside_training: whether this process may hold environments of training. A renderer could
            disturb them, so the new ones are not drawn.

    Returns:
        The environments, and whether they can be drawn beside the vectors that the agent sees.

    Raises:
        UserError: the environments cannot be built.
    """
    alone = config.env.workers or not beside_training
    if config.obs == "state" and (
        alone or not may_need_renderer(config.task, config.obs, film=True)
    ):
        try:
            drawing = pick_renderer(config, film=True)
            return make_eval_env(config, drawing, num_envs, seed, film=True), True
        except UserError as error:  # the film does without the pictures
            log.debug("no pictures: %s", error)
    return make_eval_env(config, renderer, num_envs, seed), False


@torch.no_grad()
def make_dream_against_reality_film(
    agent: Agent, env: Env, real_decisions: int, horizon: int, draws: bool = False
) -> np.ndarray:
    """Play, imagine from the state that was reached, then take the imagined actions.

    The environments wait while the agent imagines, so that both continue from the same state. This
    works with every kind of environment. The film ends where an episode ends.

    Args:
        agent: the agent.
        env: N environments.
        real_decisions: decisions that are played before the agent imagines.
        horizon: decisions that are imagined.
        draws: show the scene beside vectors, where it can be drawn.

    Returns:
        (T, H, W, 3) uint8 with T <= horizon + 1: reality, dream and error. The charts show the
        rewards, whether the episode goes on, and the distance between dream and reality. If the
        agent sees no images, there are the scene and charts of the vector instead. Without a
        scene, only the mark of the charts would move, so T is 1.
    """
    generator = torch.Generator(agent.device).manual_seed(0)
    row, _ = env.reset()
    carry = agent.initial(len(row.reward))
    for _ in range(real_decisions):
        if env.is_last.any():
            break
        action, carry = agent.act(row.to(agent.device), carry, "mean", generator)
        row, _ = env.step(action.cpu().numpy())
    state = agent.world.filter(row.to(agent.device), carry, generator=generator)
    noise = agent.world.draw_noise(len(row.reward), horizon)
    dream = imagine(agent.world.step_unmeasured, mean_action(agent), state, horizon, noise)
    rows, scenes = [row], [_scene(env, len(row.reward)) if draws else None]
    for action in dream.choice.action.clamp(-1, 1).unbind(1):
        if env.is_last.any():
            break
        row, _ = env.step(action.cpu().numpy())
        if row.is_first.any():  # an environment failed, and its episode was cut
            break
        rows.append(row)
        if scenes[0] is not None:
            scenes.append(_scene(env, len(row.reward)))
    real = join(rows, lambda x: np.stack(x, 1))
    length = len(rows)
    name = next(iter(agent.world.spec.obs))
    image = name in agent.world.spec.images
    latents = dream.latent.map(lambda x: x[:, :length])
    decoded = decode(agent, latents)[name]
    dreamed = to_numpy(decoded)
    dream_reward, dream_cont = (
        np.pad(to_numpy(x), ((0, 0), (1, 0)), constant_values=np.nan)[:, :length]
        for x in (dream.reward, dream.cont)
    )
    labels = ("reality", "dream")
    real_reward = np.where(np.arange(length) > 0, real.reward, np.nan)
    error = _distance(dreamed, real.obs[name], image)
    charts: Charts = {
        "reward": [
            Line("reality", real_reward, TEXT),
            Line("dream", dream_reward, IMAGINED),
        ],
        "continue": end_chart(real.is_terminal, dream_cont, labels),
        "distance": [Line("distance", error, IMAGINED, (0.0,))],
    }
    texts = action_texts(agent.world.spec, action=after_real_state(dream)[:, :length])
    headers = headers_after_real_state("dreamed", length - 1)
    if image:
        return make_comparison_film(real.obs[name], dreamed, headers, charts, 2, labels, texts)
    charts = {**entry_charts(real.obs[name], decoded, name, labels), **charts}
    pictures = [scene for scene in scenes if scene is not None]
    if len(pictures) == length:
        return make_film({"reality": np.stack(pictures, 1)}, headers, charts, 1, texts)
    return make_film({}, headers, charts, texts=texts)[-1:]


def _scene(env: Env, count: int) -> np.ndarray | None:
    """The scenes (count, h, w, 3) uint8 of the environments; None where they cannot be drawn."""
    try:
        images = [Image.fromarray(env.draw(i).image) for i in range(count)]
    except UserError as error:
        log.debug("no pictures: %s", error)
        return None
    for image in images:
        image.thumbnail((PICTURE_WIDTH, image.height))
    return np.stack([np.asarray(image) for image in images])


def _distance(dreamed: np.ndarray, real: np.ndarray, image: bool) -> np.ndarray:
    """Root mean square error (B, T) of images in [0, 1], or of vectors in symlog units."""
    truth = real / 255 if image else to_numpy(symlog(torch.as_tensor(real)))
    return np.sqrt(((dreamed - truth) ** 2).mean(tuple(range(2, truth.ndim))))
