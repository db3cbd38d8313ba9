"""The planner with another model than the RSSM: an ensemble of MLPs on a Gymnasium task's state."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import gymnasium
import numpy as np
import pytest
import torch
from environments import make
from torch import Tensor, nn
from torch.nn import functional as F

from latentplan.agent import Agent
from latentplan.config.schema import (
    BehaviorConfig,
    Config,
    OptimConfig,
    PlanConfig,
    WorldConfig,
)
from latentplan.data.replay import Replay
from latentplan.nn.ensemble import EnsembleMLP
from latentplan.types import EnvSpec, Latent, Prediction, StepNoise, Timestep, WorldLoss
from latentplan.world.uncertainty import member_std

EPISODES, LENGTH, PREFILL = 12, 30, 60
GOAL = 0.8  # the policy alone finds it late in half of the runs: planning has something to add


class Corridor(gymnasium.Env):
    """Start in the middle of a corridor; only one end of it pays."""

    metadata: ClassVar = {"render_modes": []}
    observation_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self, render_mode: str | None = None) -> None:
        self.place, self.steps = 0.0, 0

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        self.place, self.steps = 0.0, 0
        return self._see(), {}

    def step(self, action: np.ndarray):
        self.place = float(np.clip(self.place + 0.15 * action[0], -1, 1))
        self.steps += 1
        return self._see(), float(self.place > GOAL), False, self.steps >= LENGTH, {}

    def _see(self) -> np.ndarray:
        return np.array([self.place], np.float32)


if "Corridor-v0" not in gymnasium.registry:
    gymnasium.register("Corridor-v0", Corridor)


class Ensemble(nn.Module):
    """M MLPs from state and action to the change of the state and the reward (MBPO's kind)."""

    def __init__(self, spec: EnvSpec, members: int):
        super().__init__()
        self.spec, self.members = spec, members
        self.feature_size = spec.obs["vector"][0][0]
        # Beside a constant, without which the first norm would drop the magnitude.
        self.net = EnsembleMLP(
            members, self.feature_size + spec.action_dim + 1, 32, 2, self.feature_size + 1
        )

    # --- the verbs that an agent uses -------------------------------------------------------

    def initial(self, n: int) -> Latent:
        return self._latent(torch.zeros(n, self.feature_size))

    def features(self, latent: Latent) -> Tensor:
        return latent.deter

    def filter(
        self, row: Timestep, latent: Latent, generator: torch.Generator | None = None
    ) -> Latent:
        return self._latent(row.obs["vector"])

    def step(self, latent: Latent, action: Tensor, noise: StepNoise | None = None) -> Prediction:
        change = self._predict(latent.deter, action.clamp(-1, 1))
        n = len(action)
        member = torch.randint(self.members, (n,)) if noise is None else noise.member
        own = change[member, torch.arange(n)]
        uncertainty = member_std(change[..., :-1])
        following = self._latent(latent.deter + own[:, :-1])
        return Prediction(following, own[:, -1], torch.ones(n), uncertainty)

    step_unmeasured = step

    def draw_noise(
        self, n: int, horizon: int, generator: torch.Generator | None = None
    ) -> StepNoise:
        member = torch.randint(self.members, (1, n), generator=generator)
        return StepNoise(member.expand(horizon, n), torch.zeros(horizon, n, 1))

    def autocast(self) -> nullcontext:
        return nullcontext()

    def fit_normalizers(self, obs: dict[str, Tensor]) -> None: ...

    def count_update(self) -> None: ...

    def loss(
        self, batch: Timestep, episode: Tensor, start: Latent | None = None
    ) -> tuple[dict[str, Tensor], Latent, dict[str, Tensor]]:
        state = batch.obs["vector"]
        left, arrived = (x.flatten(0, 1) for x in (state[:, :-1], state[:, 1:]))
        prediction = self._predict(left, batch.prev_action[:, 1:].flatten(0, 1))
        target = torch.cat([arrived - left, batch.reward[:, 1:].flatten()[:, None]], 1)
        error = F.mse_loss(prediction, target.expand_as(prediction), reduction="none").sum(-1)
        # Never across an episode boundary, and each member on a share of its own.
        mask = (~batch.is_first[:, 1:]).flatten() & (torch.rand(error.shape) < 0.8)
        high = torch.quantile(member_std(prediction[..., :-1].detach()), 0.95)
        return WorldLoss({"model": (error * mask).mean()}, self._latent(state), high, {})

    # ----------------------------------------------------------------------------------------

    def _latent(self, state: Tensor) -> Latent:
        return Latent(state, torch.zeros(*state.shape[:-1], 1, 1))

    def _predict(self, state: Tensor, action: Tensor) -> Tensor:
        return self.net(torch.cat([state, action, torch.ones_like(action[:, :1])], -1))


def learn(folder: Path, seed: int, plan: PlanConfig) -> tuple[float, float]:
    """Mean return of all episodes and of the last three."""
    torch.manual_seed(seed)
    config = Config(
        world=WorldConfig(members=5),
        behavior=BehaviorConfig(units=32, layers=1, bins=41, horizon=8, discount_horizon=20.0),
        plan=plan,
        optim=OptimConfig(world_lr=3e-3, actor_lr=3e-3, critic_lr=3e-3, warmup=10),
    )
    rng = np.random.default_rng(seed)
    with make("gym:Corridor-v0", seed=seed, repeat=1) as env:
        agent = Agent(env.spec, config, world=Ensemble(env.spec, 5))
        replay = Replay(folder, env.spec, capacity=5000, envs=1)
        returns, total = [], 0.0
        row, _ = env.reset()
        carry = agent.initial(1)
        for t in range(EPISODES * (LENGTH + 1)):
            replay.add(row, env.episodes - 1)
            total += float(row.reward[0])
            if env.is_last[0]:
                returns.append(total)
                total = 0.0
            action, carry, *_ = agent.explore(row.to(agent.device), carry)
            if t >= PREFILL and t % 2 == 0:
                batch, episode = replay.sample(8, 12, rng)
                agent.update(batch.to(agent.device), torch.as_tensor(episode))
            row, _ = env.step(action.numpy())
        replay.close()
    return float(np.mean(returns)), float(np.mean(returns[-3:]))


@pytest.mark.last
def test_planning_helps_another_model_to_learn(tmp_path: Path) -> None:
    plain = PlanConfig(candidates=1)
    planned = replace(plain, candidates=4, horizon=4, replan_every=2)
    scores = {
        name: [learn(tmp_path / f"{name}{seed}", seed, plan) for seed in range(5)]
        for name, plan in (("plain", plain), ("planned", planned))
    }
    means = {name: np.mean(x, 0) for name, x in scores.items()}
    assert means["planned"][0] > means["plain"][0], scores
    # A run that never meets the reward learns nothing, whatever it plans: two in ten do not.
    assert sum(last > 20 for _, last in scores["planned"]) >= 2, scores
