"""The encoder: convolutions for images, and an MLP for vectors."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from latentplan.config.schema import WorldConfig
from latentplan.nn.convolution import HalvingConv
from latentplan.nn.layers import MLP, ChannelNorm, init_weight
from latentplan.types import EnvSpec, UserError
from latentplan.world.image_normalizer import PATCH

LEVELS = 4  # halvings between the image and the smallest feature map


class ConvEncoder(nn.Module):
    """Normalized patches of an image (N, h, w, C) -> (N, X).

    Channels double from ``depth`` at half of the image's size to 8 ``depth`` at a sixteenth.
    ``strided`` uses four 4 x 4 convolutions of stride 2. With ``patch``, a product with patches of
    4 x 4 pixels replaces the first two halvings. The widest feature map is then not computed, and
    the encoder takes half of the time.
    """

    def __init__(self, shape: tuple[int, ...], config: WorldConfig):
        super().__init__()
        height, width, channels = shape
        if height % 2**LEVELS or width % 2**LEVELS:
            raise UserError(
                f"An image of {height} x {width} cannot be halved {LEVELS} times: "
                f"choose env.image_size divisible by {2**LEVELS}."
            )
        scale = PATCH[config.coder]
        channels *= scale**2
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        if scale > 1:
            channels = self._add(nn.Conv2d(channels, config.depth * scale // 2, 1), config.norm)
        while scale < 2**LEVELS:
            scale *= 2
            channels = self._add(HalvingConv(channels, config.depth * scale // 2), config.norm)
        self.size = channels * (height // scale) * (width // scale)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _add(self, conv: nn.Conv2d, norm: str) -> int:
        """Initialize and append a convolution and its norm; return the number of its channels."""
        init_weight(conv.weight, conv.weight[0].numel())
        if conv.bias is not None:
            nn.init.zeros_(conv.bias)
        self.convs.append(conv)
        self.norms.append(ChannelNorm(norm, conv.out_channels))
        return conv.out_channels

    def forward(self, image: Tensor) -> Tensor:
        # An NHWC image with swapped axes has the channels-last layout, so nothing is copied.
        x = rearrange(image, "n h w c -> n c h w")
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.silu(norm(conv(x)))
        return rearrange(x, "n c h w -> n (h w c)")


class Encoder(nn.Module):
    """All observations of a row -> one embedding: {name: (..., shape)} -> (..., X) float32.

    Images come as normalized patches (:class:`ImageNormalizer`), vectors are standardized
    (:class:`VectorNormalizer`), so that their units do not matter.
    """

    def __init__(self, spec: EnvSpec, config: WorldConfig):
        super().__init__()
        self.images, self.vectors = spec.images, spec.vectors
        convs = {name: ConvEncoder(spec.obs[name][0], config) for name in self.images}
        self.convs = nn.ModuleDict(convs)
        self.size = sum(conv.size for conv in convs.values())
        if self.vectors:
            inputs = sum(spec.obs[name][0][0] for name in self.vectors) + 1
            layers, units = config.vector_layers, config.units
            self.mlp = MLP(inputs, units, layers - 1, units, norm=config.norm)
            self.size += units

    def forward(self, obs: dict[str, Tensor]) -> Tensor:
        parts = []
        for name in self.images:
            image = obs[name]
            embed = self.convs[name](image.reshape(-1, *image.shape[-3:]))
            parts.append(embed.float().reshape(*image.shape[:-3], -1))
        if self.vectors:
            vector = torch.cat([obs[name] for name in self.vectors], -1)
            # The constant keeps the vector's magnitude, which the first norm would remove.
            parts.append(self.mlp(F.pad(vector, (0, 1), value=1.0)).float())
        return torch.cat(parts, -1)
