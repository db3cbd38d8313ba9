from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from tiny import VECTOR, agent_config, initialize_zero_heads, random_batch, world_config
from torch import Tensor, nn

from latentplan.agent import Agent
from latentplan.behavior.behavior import frozen
from latentplan.behavior.imagination import imagine
from latentplan.types import Choice, EnvSpec, Latent, Prediction, Rollout, StepNoise


def make_agent(**behavior: Any) -> Agent:
    torch.manual_seed(0)
    return Agent(VECTOR, agent_config(**behavior))


# --- imagination ----------------------------------------------------------------------------


def counted(latent: Latent, action: Tensor, noise: StepNoise | None) -> Prediction:
    """A model that adds the action up and says what it was told."""
    total = latent.deter + action
    draw = torch.zeros(len(action)) if noise is None else noise.uniform[:, 0]
    return Prediction(Latent(total, latent.stoch), total[:, 0], total[:, 0] / 100, draw)


def count_up(horizon: int, noise: StepNoise | None = None) -> Rollout:
    start = Latent(torch.tensor([[0.0], [10.0]]), torch.zeros(2, 1, 2))
    act = lambda latent, h: Choice(torch.full((2, 1), h + 1.0), 100 + latent.deter)  # noqa: E731
    return imagine(counted, act, start, horizon, noise)


def test_a_rollout_is_aligned() -> None:
    """Index h of reward, cont and uncertainty is arriving at state h + 1, by action h."""
    rollout = count_up(3)
    states = torch.tensor([[0.0, 1.0, 3.0, 6.0], [10.0, 11.0, 13.0, 16.0]])
    assert torch.equal(rollout.latent.deter.squeeze(-1), states)
    assert rollout.latent.stoch.shape == (2, 4, 1, 2)
    assert torch.equal(rollout.choice.action.squeeze(-1), torch.tensor([[1.0, 2.0, 3.0]] * 2))
    assert torch.equal(rollout.choice.noise.squeeze(-1), 100 + states[:, :-1])
    assert torch.equal(rollout.reward, states[:, 1:])
    torch.testing.assert_close(rollout.cont, states[:, 1:] / 100)


def test_a_rollout_uses_the_noise_of_each_step() -> None:
    noise = StepNoise(None, torch.arange(6.0).view(3, 2, 1))
    assert count_up(3, noise).uncertainty.tolist() == [[0, 2, 4], [1, 3, 5]]


def test_an_unmeasured_rollout_has_no_uncertainty() -> None:
    start = Latent(torch.zeros(2, 1), torch.zeros(2, 1, 2))
    act = lambda latent, h: Choice(torch.zeros(2, 1), torch.zeros(2, 1))  # noqa: E731
    quick = lambda *inputs: counted(*inputs)._replace(uncertainty=None)  # noqa: E731
    assert imagine(quick, act, start, 2).uncertainty is None


# --- gradients ------------------------------------------------------------------------------


def behavior_gradients(agent: Agent) -> tuple[dict[str, Tensor], bool, bool]:
    """Losses of the behavior after going backward; whether the world's and the actor's moved."""
    batch, _ = random_batch(4, 3)
    with torch.no_grad():
        start, _ = agent.world.observe(batch)
    agent.zero_grad()
    losses, _ = agent.learner.losses(start, batch)
    losses["policy"].backward()
    touched = lambda net: any(p.grad is not None and p.grad.any() for p in net.parameters())  # noqa: E731
    return losses, touched(agent.world), touched(agent.actor)


@pytest.mark.parametrize("gradient", ["pathwise", "reinforce"])
def test_the_policy_loss_reaches_the_actor_and_nothing_else(gradient: str) -> None:
    agent = make_agent(gradient=gradient, entropy=0.0)
    initialize_zero_heads(agent)
    losses, world, actor = behavior_gradients(agent)
    assert not world and actor
    assert all(p.grad is None for p in agent.critic.parameters())
    assert losses["value"].requires_grad


def test_pathwise_has_nothing_to_climb_before_rewards_are_known() -> None:
    """The heads start at zero: without the entropy bonus the actor must not move."""
    agent = make_agent(gradient="pathwise", entropy=0.0)
    assert not behavior_gradients(agent)[2]


def test_frozen_lets_gradients_through_but_not_in() -> None:
    layer, x = nn.Linear(2, 1), torch.ones(1, 2, requires_grad=True)
    with frozen(layer):
        out = layer(x).sum()
    out.backward()
    assert layer.weight.grad is None and x.grad.any()
    layer(x).sum().backward()  # thawed again
    assert layer.weight.grad is not None
    with contextlib.suppress(ValueError), frozen(layer):
        raise ValueError
    assert layer.weight.requires_grad


# --- a world whose optimum is known ---------------------------------------------------------


class PointMass(nn.Module):
    """A point on a line, pushed by the action; the reward is how near it is to zero."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bins", torch.zeros(1))

    def features(self, latent: Latent) -> Tensor:
        return torch.cat([latent.deter, latent.stoch.flatten(-2)], -1)

    def autocast(self) -> Any:
        return contextlib.nullcontext()

    def draw_noise(self, n: int, horizon: int) -> StepNoise:
        return StepNoise(None, torch.zeros(horizon, n, 1))

    def step(self, latent: Latent, action: Tensor, noise: StepNoise | None = None) -> Prediction:
        position = latent.deter + 0.3 * action.clamp(-1, 1)
        reward = 1 - position.square().squeeze(-1)
        return Prediction(
            Latent(position, latent.stoch),
            reward,
            torch.ones_like(reward),
            torch.zeros_like(reward),
        )

    step_unmeasured = step


@pytest.mark.parametrize("gradient", ["pathwise", "reinforce"])
def test_the_actor_learns_what_pays(gradient: str) -> None:
    torch.manual_seed(0)
    config = agent_config(
        world_config(deter=1, stoch=1, classes=2, blocks=1, members=1),
        gradient=gradient,
        horizon=6,
        discount_horizon=10.0,
        units=16,
        replay_scale=0.0,
    )
    agent = Agent(EnvSpec({"vector": ((1,), "float32")}, 1, 1), config)
    agent.world = agent.behavior.world = PointMass()
    for group in agent.optimizer.param_groups:
        group["lr"] = 5e-3
    batch = random_batch(16, 4)[0]

    def starts(n: int) -> Latent:
        return Latent(2 * torch.rand(n, 1) - 1, torch.tensor([[[1.0, 0.0]]]).expand(n, 1, 2))

    @torch.no_grad()
    def gain() -> float:
        """What the policy's mean earns on average, per step."""
        generator = torch.get_rng_state()
        torch.manual_seed(1)
        mode = lambda latent, h: Choice(*[agent.actor(agent.world.features(latent)).mode] * 2)  # noqa: E731
        rollout = imagine(agent.world.step, mode, starts(200), 6)
        torch.set_rng_state(generator)
        return rollout.reward.mean().item()

    before = gain()
    for _ in range(120):
        agent.optimizer.zero_grad()
        start = Latent(*(x.view(16, 4, *x.shape[1:]) for x in starts(64)))
        losses, _ = agent.learner.losses(start, batch)
        sum(losses.values()).backward()
        agent.optimizer.step()
        agent.critic.follow()
    # Staying put earns 0.67; moving to zero at full speed 0.93.
    assert before == pytest.approx(0.67, abs=0.05)
    assert gain() > 0.85
