"""Open loop: the model filters some rows, and predicts the later ones from the actions alone."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from latentplan.agent import Agent
from latentplan.behavior.imagination import follow, imagine
from latentplan.inspection.action_names import action_texts
from latentplan.inspection.canvas import IMAGINED, UNCERTAIN, Charts, Line
from latentplan.inspection.entries import end_chart, entry_charts
from latentplan.inspection.film import make_comparison_film, make_film, open_loop_headers
from latentplan.runs.stamp import TEXT
from latentplan.types import Latent, Timestep


class OpenLoop(NamedTuple):
    """Reconstructions of the context rows, then open-loop predictions, of rows (B, T)."""

    decoded: dict[str, Tensor]  # {name: (B, T, *shape)}
    reward: Tensor  # (B, T) predicted reward of arriving in each row
    cont: Tensor  # (B, T) predicted probability that the episode continues after each row
    uncertainty: Tensor  # (B, T) of the action that led to each row; NaN in context rows


@torch.no_grad()
def open_loop(agent: Agent, batch: Timestep, context: int) -> OpenLoop:
    """Filter the first ``context`` rows of a batch (B, T), then predict along its actions."""
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
    reward, cont = world.outcome(world.features(latents))
    assert rollout.uncertainty is not None  # `step` always computes it
    unknown = torch.full_like(batch.reward[:, :context], torch.nan)
    uncertainty = torch.cat([unknown, rollout.uncertainty], 1)
    return OpenLoop(decode(agent, latents), reward, cont, uncertainty)


def decode(agent: Agent, latent: Latent) -> dict[str, Tensor]:
    """Decode latents (..., D) to observations {name: (..., *shape)}. Images are in [0, 1]."""
    leading = latent.deter.shape[:-1]
    flat = Latent(latent.deter.flatten(0, -2), latent.stoch.flatten(0, -3))
    return {k: x.unflatten(0, leading) for k, x in agent.world.decode(flat).items()}


def to_numpy(x: Tensor) -> np.ndarray:
    """A float32 array on the CPU, of the same shape."""
    return x.float().cpu().numpy()


def make_open_loop_film(agent: Agent, batch: Timestep, context: int) -> np.ndarray:
    """Make the film of :func:`open_loop`.

    Returns:
        (T, H, W, 3) uint8. If the agent sees no images, it shows the entries of the vector that
        vary most in the place of images.
    """
    result = open_loop(agent, batch, context)
    rewards = (
        Line("true", to_numpy(batch.reward), TEXT),
        Line("model", to_numpy(result.reward), IMAGINED),
    )
    charts: Charts = {
        "reward": rewards,
        "continue": end_chart(batch.is_terminal.cpu().numpy(), to_numpy(result.cont)),
        "uncertainty": [Line("uncertainty", to_numpy(result.uncertainty), UNCERTAIN)],
    }
    texts = action_texts(agent.world.spec, action=batch.prev_action)
    headers = open_loop_headers(context, batch.reward.shape[1])
    images = agent.world.spec.images
    if not images:
        name = agent.world.spec.vectors[0]
        entries = entry_charts(to_numpy(batch.obs[name]), result.decoded[name], name)
        return make_film({}, headers, {**entries, **charts}, texts=texts)
    truth = batch.obs[images[0]].cpu().numpy()
    model = to_numpy(result.decoded[images[0]])
    return make_comparison_film(truth, model, headers, charts, texts=texts)
