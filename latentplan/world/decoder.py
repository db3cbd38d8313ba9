"""The decoder: latent features to reconstructions, as the mirror of the encoder."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from latentplan.config.schema import WorldConfig
from latentplan.nn.convolution import DoublingConv
from latentplan.nn.layers import MLP, ChannelNorm, Linear, init_weight
from latentplan.types import EnvSpec
from latentplan.world.encoder import LEVELS
from latentplan.world.image_normalizer import PATCH


class ConvDecoder(nn.Module):
    """Features (N, F) -> normalized patches of an image (N, h, w, C).

    ``strided`` uses transposed convolutions. With ``patch``, one 3 x 3 convolution to patches of
    4 x 4 pixels replaces the last two doublings. At full size this takes a third of the work.
    """

    def __init__(self, features: int, shape: tuple[int, ...], config: WorldConfig):
        super().__init__()
        height, width, channels = shape
        norm, patch = config.norm, PATCH[config.coder]
        self.start = (height // 2**LEVELS, width // 2**LEVELS)
        wide = config.depth * 2 ** (LEVELS - 1)
        self.input = Linear(features, self.start[0] * self.start[1] * wide)
        self.input_norm = ChannelNorm(norm, wide)
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        while wide > config.depth * max(1, patch // 2):
            # There is no bias: before a norm it has little effect, and its gradient is expensive.
            conv = DoublingConv(wide, wide // 2)
            init_weight(conv.weight, wide * 4)  # 4 of the 16 taps meet each output pixel
            wide //= 2
            self.convs.append(conv)
            self.norms.append(ChannelNorm(norm, wide))
        if patch > 1:
            self.output: nn.Conv2d | nn.ConvTranspose2d = nn.Conv2d(
                wide, channels * patch**2, 3, padding=1
            )
            init_weight(self.output.weight, wide * 9)
        else:
            self.output = nn.ConvTranspose2d(wide, channels, 4, stride=2, padding=1)
            init_weight(self.output.weight, wide * 4)
        if self.output.bias is not None:
            nn.init.zeros_(self.output.bias)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, features: Tensor) -> Tensor:
        x = rearrange(
            self.input(features), "n (h w c) -> n c h w", h=self.start[0], w=self.start[1]
        )
        x = F.silu(self.input_norm(x))
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.silu(norm(conv(x)))
        return rearrange(self.output(x), "n c h w -> n h w c")


class Decoder(nn.Module):
    """Features (N, F) -> {name: (N, ...)}.

    Images are normalized patches in the precision of the convolutions, vectors are standardized.
    """

    def __init__(self, spec: EnvSpec, features: int, config: WorldConfig):
        super().__init__()
        self.images, self.vectors = spec.images, spec.vectors
        self.convs = nn.ModuleDict(
            {name: ConvDecoder(features, spec.obs[name][0], config) for name in self.images}
        )
        self.sizes = [spec.obs[name][0][0] for name in self.vectors]
        if self.vectors:
            self.mlp = MLP(
                features, config.units, config.vector_layers, sum(self.sizes), norm=config.norm
            )

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        out = {name: self.convs[name](features) for name in self.images}
        if self.vectors:
            parts = self.mlp(features).float().split(self.sizes, -1)
            out.update(zip(self.vectors, parts, strict=True))
        return out
