"""Open loop: the model sees some rows, and predicts the rest from the actions alone."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from latentplan.agent import Agent
from latentplan.behavior.imagination import follow, imagine
from latentplan.inspection.canvas import IMAGINED, TEXT, UNCERTAIN, Charts, Line
from latentplan.inspection.film import film, open_loop_film, open_loop_headers
from latentplan.types import Latent, Timestep


class OpenLoop(NamedTuple):
    """Of rows (B, T): what the model makes of the first, then what it sees coming."""

    decoded: dict[str, Tensor]  # {name: (B, T, *shape)}
    reward: Tensor  # (B, T) of arriving in each row
    uncertainty: Tensor  # (B, T) of the action that led there; nan where the row was seen


@torch.no_grad()
def open_loop(agent: Agent, batch: Timestep, context: int) -> OpenLoop:
    """See ``context`` rows of a batch (B, T), then follow its actions."""
    world, n = agent.world, batch.reward.shape[0]
    posterior, _ = world.observe(batch.map(lambda x: x[:, :context]))
    actions = batch.prev_action[:, context:]
    start = posterior.map(lambda x: x[:, -1])
    horizon = actions.shape[1]
    noise = world.draw_noise(n, horizon)
    rollout = imagine(world.step, follow(actions), start, horizon, noise)
    latents = Latent(
        *(torch.cat([a, b[:, 1:]], 1) for a, b in zip(posterior, rollout.latent, strict=True))
    )
    reward, _ = world.outcome(world.features(latents))
    assert rollout.uncertainty is not None  # `step` always measures it
    seen = torch.full_like(batch.reward[:, :context], torch.nan)
    return OpenLoop(decode(agent, latents), reward, torch.cat([seen, rollout.uncertainty], 1))


def decode(agent: Agent, latent: Latent) -> dict[str, Tensor]:
    """Observations of latents (..., D): {name: (..., *shape)}, pictures in [0, 1]."""
    leading = latent.deter.shape[:-1]
    flat = Latent(latent.deter.flatten(0, -2), latent.stoch.flatten(0, -3))
    return {k: x.unflatten(0, leading) for k, x in agent.world.decode(flat).items()}


def array(x: Tensor) -> np.ndarray:
    """For painting."""
    return x.float().cpu().numpy()


def show_open_loop(agent: Agent, batch: Timestep, context: int) -> np.ndarray:
    """The film of :func:`open_loop`: (T, H, W, 3); without pictures, its charts."""
    found = open_loop(agent, batch, context)
    rewards = Line("true", array(batch.reward), TEXT), Line("model", array(found.reward), IMAGINED)
    charts: Charts = {
        "reward": rewards,
        "uncertainty": [Line("uncertainty", array(found.uncertainty), UNCERTAIN)],
    }
    headers = open_loop_headers(context, batch.reward.shape[1])
    images = agent.world.spec.images
    if not images:
        return film({}, headers, charts)
    truth = batch.obs[images[0]].cpu().numpy()
    return open_loop_film(truth, array(found.decoded[images[0]]), headers, charts)
