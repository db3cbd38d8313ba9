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

THUMBNAIL = 32  # pixels; TensorBoard refuses pictures of all points above 8192 x 8192


class LatentMap(NamedTuple):
    """N states."""

    features: Tensor  # (N, F)
    columns: dict[str, np.ndarray]  # {name: (N,)} to color the points by
    thumbnails: Tensor | None  # (N, 3, h, w) in [0, 1]


@torch.no_grad()
def latent_map(agent: Agent, batch: Timestep) -> LatentMap:
    """The posterior states of rows (B, T), each window within one episode.

    The return is what followed within the window, discounted, plus the critic's value of its end.
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
        pictures = flat(batch.obs[world.spec.images[0]]).cpu().numpy()
        small = torch.from_numpy(resize_frames(pictures, THUMBNAIL))
        thumbnails = rearrange(small, "n h w c -> n c h w").float() / 255
    return LatentMap(
        flat(world.features(posterior)).float(),
        {name: flat(x).float().cpu().numpy() for name, x in columns.items()},
        thumbnails,
    )
