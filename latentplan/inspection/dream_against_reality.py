"""A dream against reality: what the policy imagines, then the very same actions for real."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch

from latentplan.agent import Agent
from latentplan.behavior.imagination import imagine
from latentplan.inspection.canvas import IMAGINED, TEXT, Charts, Line
from latentplan.inspection.film import film, open_loop_film
from latentplan.inspection.imagined_rollouts import mean_action, real_start
from latentplan.inspection.open_loop import array, decode
from latentplan.nn.distributions import symlog
from latentplan.types import Timestep, join


class Env(Protocol):
    """What is used of a :class:`latentplan.envs.vector.VectorEnv` of N environments."""

    is_last: np.ndarray

    def reset(self) -> tuple[Timestep, Any]: ...

    def step(self, action: np.ndarray) -> tuple[Timestep, Any]: ...


@torch.no_grad()
def show_reality(agent: Agent, env: Env, begin: int, horizon: int) -> np.ndarray:
    """Play ``begin`` decisions, let the policy dream ``horizon`` more, then act out the dream.

    The simulators stand still while the agent dreams, so that both start from the same state;
    an environment of any kind can do that. Where an episode ends, so does the film.

    Returns:
        (T, H, W, 3): reality, dream and error, with rewards and the distance of the two as charts.
        Without pictures, the charts alone.
    """
    generator = torch.Generator(agent.device).manual_seed(0)
    row, _ = env.reset()
    carry = agent.initial(len(row.reward))
    for _ in range(begin):
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
        rows.append(env.step(action.cpu().numpy())[0])
    real = join(rows, lambda x: np.stack(x, 1))
    length = len(rows)
    name = next(iter(agent.world.spec.obs))
    image = name in agent.world.spec.images
    seen = dream.latent.map(lambda x: x[:, :length])
    dreamed = array(decode(agent, seen)[name])
    reward = np.pad(array(dream.reward), ((0, 0), (1, 0)), constant_values=np.nan)
    earned = np.where(np.arange(length) > 0, real.reward, np.nan)
    error = _distance(dreamed, real.obs[name], image)
    charts: Charts = {
        "reward": [Line("reality", earned, TEXT), Line("dream", reward[:, :length], IMAGINED)],
        "distance": [Line("distance", error, IMAGINED, (0.0,))],
    }
    headers = real_start("dreamed", length - 1)
    if not image:
        return film({}, headers, charts)
    return open_loop_film(real.obs[name], dreamed, headers, charts, names=("reality", "dream"))


def _distance(dreamed: np.ndarray, real: np.ndarray, image: bool) -> np.ndarray:
    """Root mean square error (B, T), of pictures in [0, 1] or vectors in symlog units."""
    truth = real / 255 if image else array(symlog(torch.as_tensor(real)))
    return np.sqrt(((dreamed - truth) ** 2).mean(tuple(range(2, truth.ndim))))
