"""A film that compares an imagined rollout with the environment under the same actions."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch

from latentplan.agent import Agent
from latentplan.behavior.imagination import imagine
from latentplan.inspection.canvas import IMAGINED, Charts, Line
from latentplan.inspection.film import make_comparison_film, make_film
from latentplan.inspection.imagined_rollouts import headers_after_real_state, mean_action
from latentplan.inspection.open_loop import decode, to_numpy
from latentplan.nn.distributions import symlog
from latentplan.runs.stamp import TEXT
from latentplan.types import Timestep, join


class Env(Protocol):
    """The part of :class:`latentplan.envs.vector.VectorEnv` that this module needs."""

    is_last: np.ndarray

    def reset(self) -> tuple[Timestep, Any]: ...

    def step(self, action: np.ndarray) -> tuple[Timestep, Any]: ...


@torch.no_grad()
def make_dream_against_reality_film(
    agent: Agent, env: Env, real_decisions: int, horizon: int
) -> np.ndarray:
    """Play, imagine from the state that was reached, then take the imagined actions.

    The environments wait while the agent imagines, so that both continue from the same state. This
    works with every kind of environment. The film ends where an episode ends.

    Args:
        agent: the agent.
        env: N environments.
        real_decisions: decisions that are played before the agent imagines.
        horizon: decisions that are imagined.

    Returns:
        (T, H, W, 3) uint8 with T <= horizon + 1: reality, dream and error. The charts show the
        rewards and the distance between dream and reality. There are only charts if the agent
        sees no images.
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
    rows = [row]
    for action in dream.choice.action.clamp(-1, 1).unbind(1):
        if env.is_last.any():
            break
        row, _ = env.step(action.cpu().numpy())
        if row.is_first.any():  # an environment failed, and its episode was cut
            break
        rows.append(row)
    real = join(rows, lambda x: np.stack(x, 1))
    length = len(rows)
    name = next(iter(agent.world.spec.obs))
    image = name in agent.world.spec.images
    latents = dream.latent.map(lambda x: x[:, :length])
    dreamed = to_numpy(decode(agent, latents)[name])
    dream_reward = np.pad(to_numpy(dream.reward), ((0, 0), (1, 0)), constant_values=np.nan)
    real_reward = np.where(np.arange(length) > 0, real.reward, np.nan)
    error = _distance(dreamed, real.obs[name], image)
    charts: Charts = {
        "reward": [
            Line("reality", real_reward, TEXT),
            Line("dream", dream_reward[:, :length], IMAGINED),
        ],
        "distance": [Line("distance", error, IMAGINED, (0.0,))],
    }
    headers = headers_after_real_state("dreamed", length - 1)
    if not image:
        return make_film({}, headers, charts)
    return make_comparison_film(
        real.obs[name], dreamed, headers, charts, names=("reality", "dream")
    )


def _distance(dreamed: np.ndarray, real: np.ndarray, image: bool) -> np.ndarray:
    """Root mean square error (B, T) of images in [0, 1], or of vectors in symlog units."""
    truth = real / 255 if image else to_numpy(symlog(torch.as_tensor(real)))
    return np.sqrt(((dreamed - truth) ** 2).mean(tuple(range(2, truth.ndim))))
