"""The latent map: states as points for TensorBoard's projector, with thumbnails and returns."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from latentplan.agent import Agent
from latentplan.behavior.returns import lambda_returns
from latentplan.runtime.torchvision_compat import resize_frames
from latentplan.types import Timestep

THUMBNAIL = 32  # pixels; the thumbnails of all points must fit into 8192 x 8192 in TensorBoard


class LatentMap(NamedTuple):
    """N states, with values that describe them."""

    features: Tensor  # (N, F)
    columns: dict[str, np.ndarray]  # {name: (N,)} values by which points can be colored
    thumbnails: Tensor | None  # (N, 3, h, w) in [0, 1]; None if the agent sees no images


@torch.no_grad()
def latent_map(agent: Agent, batch: Timestep) -> LatentMap:
    """Collect the posterior states of rows (B, T). Each window is within one episode.

    The return of a state is the discounted sum of the later rewards of its window, plus the
    critic's value of the last state.
    """
    world, behavior = agent.world, agent.behavior
    posterior, _ = world.observe(batch)
    value = behavior.value(posterior)
    discount = agent.config.behavior.discount * (~batch.is_terminal[:, 1:]).float()
    returns = lambda_returns(batch.reward[:, 1:], value[:, 1:], discount, 1.0)
    returns = torch.cat([returns, value[:, -1:]], 1)
    flat = lambda x: rearrange(x, "b t ... -> (b t) ...")  # noqa: E731
    number = torch.arange(len(value))[:, None].expand(value.shape)
    columns = {"return": returns, "value": value, "reward": batch.reward, "window": number}
    thumbnails = None
    if world.spec.images:
        images = flat(batch.obs[world.spec.images[0]]).cpu().numpy()
        small = torch.from_numpy(resize_frames(images, THUMBNAIL))
        thumbnails = rearrange(small, "n h w c -> n c h w").float() / 255
    return LatentMap(
        flat(world.features(posterior)).float(),
        {name: flat(x).float().cpu().numpy() for name, x in columns.items()},
        thumbnails,
    )
