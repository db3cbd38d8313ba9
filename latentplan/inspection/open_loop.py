"""Open loop: the model sees some rows, and predicts the rest from the actions alone."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from latentplan.agent import Agent
from latentplan.behavior.imagine import follow, imagine
from latentplan.types import Latent, Timestep


@torch.no_grad()
def open_loop(agent: Agent, batch: Timestep, context: int) -> dict[str, Tensor]:
    """See ``context`` rows of a batch (B, T), then follow its actions.

    Returns:
        {name: (B, T, *shape)} decoded: reconstructions first, predictions from ``context`` on.
    """
    world, n = agent.world, batch.reward.shape[0]
    posterior, _ = world.observe(batch.map(lambda x: x[:, :context]))
    actions = batch.prev_action[:, context:]
    start = Latent(*(x[:, -1] for x in posterior))
    horizon = actions.shape[1]
    noise = world.draw_noise(n, horizon)
    rollout = imagine(world.step_unmeasured, follow(actions), start, horizon, noise)
    latents = Latent(
        *(torch.cat([a, b[:, 1:]], 1) for a, b in zip(posterior, rollout.latent, strict=True))
    )
    decoded = world.decode(Latent(*(rearrange(x, "b t ... -> (b t) ...") for x in latents)))
    return {k: rearrange(x, "(b t) ... -> b t ...", b=n) for k, x in decoded.items()}
