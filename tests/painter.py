"""A world whose images show its state: a gray level, which actions make lighter or darker."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import torch
from tiny import agent_config
from torch import Tensor, nn

from latentplan.agent import Agent
from latentplan.config.schema import PlanConfig
from latentplan.types import EnvSpec, Latent, Prediction, StepNoise, Timestep

SIZE = 8
SPEC = EnvSpec({"image": ((SIZE, SIZE, 3), "uint8")}, 1, 1)
VECTOR_SPEC = EnvSpec({"vector": ((1,), "float32")}, 1, 1)


def advance(level: Tensor, action: Tensor) -> Tensor:
    """The next level: (N, 1), (N, 1) -> (N, 1).

    Levels change by multiples of 1 / 255, so that uint8 images represent them exactly.
    """
    return (level + torch.round(20 * action.clamp(-1, 1)) / 255).clamp(0, 1)


class Painter(nn.Module):
    """A perfect model of that world.

    The reward is the next level, and the uncertainty is the absolute change of the level.
    """

    feature_size = 1

    def __init__(self, spec: EnvSpec = SPEC) -> None:
        super().__init__()
        self.spec = spec

    def initial(self, n: int) -> Latent:
        return self._latent(torch.zeros(n, 1))

    def features(self, latent: Latent) -> Tensor:
        return latent.deter

    def filter(self, row: Timestep, latent: Latent, generator: torch.Generator | None = None):
        return self._latent(self._read(row.obs))

    def observe(self, batch: Timestep) -> tuple[Latent, None]:
        return self._latent(self._read(batch.obs)), None

    def step(self, latent: Latent, action: Tensor, noise: StepNoise | None = None) -> Prediction:
        level = advance(latent.deter, action)
        added = (level - latent.deter).abs()[:, 0]
        return Prediction(self._latent(level), level[:, 0], torch.ones(len(level)), added)

    step_unmeasured = step

    def outcome(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return features[..., 0], torch.ones_like(features[..., 0])

    def decode(self, latent: Latent) -> dict[str, Tensor]:
        if not self.spec.images:
            return {"vector": torch.log1p(latent.deter)}
        return {"image": latent.deter[..., None, None].expand(-1, SIZE, SIZE, 3)}

    def draw_noise(self, n: int, horizon: int, generator: torch.Generator | None = None):
        return StepNoise(None, torch.zeros(horizon, n, 1))

    def autocast(self) -> nullcontext:
        return nullcontext()

    def _read(self, obs: dict[str, Tensor]) -> Tensor:
        if not self.spec.images:
            return obs["vector"]
        return obs["image"].float().flatten(-3).mean(-1, keepdim=True) / 255

    @staticmethod
    def _latent(level: Tensor) -> Latent:
        return Latent(level, torch.zeros(*level.shape, 1))


def make_painter(candidates: int = 3, spec: EnvSpec = SPEC, **plan: float) -> Agent:
    torch.manual_seed(0)
    config = replace(agent_config(), plan=PlanConfig(candidates=candidates, horizon=2, **plan))
    return Agent(spec, config, world=Painter(spec))


def render(level: Tensor) -> np.ndarray:
    """Levels (..., 1) -> images (..., SIZE, SIZE, 3) uint8."""
    gray = torch.round(255 * level).byte().numpy()[..., None, None]
    return np.broadcast_to(gray, (*gray.shape[:-3], SIZE, SIZE, 3)).copy()


def painted_batch(batch: int, length: int, spec: EnvSpec = SPEC) -> Timestep:
    """Rows (B, T) that the world produces for random actions."""
    generator = torch.Generator().manual_seed(1)
    action = torch.rand(batch, length, 1, generator=generator) * 2 - 1
    action[:, 0] = 0
    levels = [torch.full((batch, 1), 102 / 255)]
    for t in range(1, length):
        levels.append(advance(levels[-1], action[:, t]))
    level = torch.stack(levels, 1)
    first = torch.zeros(batch, length, dtype=torch.bool)
    first[:, 0] = True
    obs = {"image": torch.from_numpy(render(level))} if spec.images else {"vector": level}
    reward = torch.where(first, 0.0, level[..., 0])
    return Timestep(obs, action, reward, first, torch.zeros_like(first))


class PaintedEnv:
    """Two environments of that world. An episode ends after ``length`` rows.

    In every step ``drift`` is added to the level, which the model does not predict.
    """

    def __init__(self, length: int, drift: float = 0.0) -> None:
        self.length, self.drift, self.is_last = length, drift, np.zeros(2, bool)

    def reset(self) -> tuple[Timestep, None]:
        self.level, self.rows = torch.tensor([[0.2], [102 / 255]]), 1
        return self._row(torch.zeros(2, 1), first=True), None

    def step(self, action: np.ndarray) -> tuple[Timestep, None]:
        assert not self.is_last.any(), "step() was called after the end of the episode"
        taken = torch.as_tensor(action)
        self.level = advance(self.level, taken) + self.drift
        self.rows += 1
        self.is_last[:] = self.rows >= self.length
        return self._row(taken), None

    def _row(self, action: Tensor, first: bool = False) -> Timestep:
        return Timestep(
            {"image": render(self.level)},
            action.numpy(),
            self.level[:, 0].numpy() * (not first),
            np.full(2, first),
            np.zeros(2, bool),
        )
