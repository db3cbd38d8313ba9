"""Dreamer's improvement: its losses by hand, on given numbers and in an agent."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import VECTOR, agent_config, limit_two_hot_range, perturb, random_batch, record_results
from torch import Tensor
from torch.distributions import Normal

from latentplan.agent import Agent
from latentplan.behavior.behavior import frozen
from latentplan.behavior.losses import Target, actor_loss
from latentplan.behavior.networks import Critic
from latentplan.config.schema import BehaviorConfig, Config, DistillConfig, PlanConfig
from latentplan.nn.action_distributions import ActionDist
from latentplan.types import Choice, Latent, Rollout

GRADIENTS = ["reinforce", "pathwise"]
GAMMA, LAM, ALPHA, PULL, SCALE = 0.8, 0.7, 0.3, 0.4, 7.0
HORIZON, DISTILL, TAU = 3, 0.7, 0.4


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_the_actor_loss_by_hand(gradient: str) -> None:
    mean, std = torch.tensor([[[0.1], [0.3]]]), torch.full((1, 2, 1), 0.5)
    action, weight = torch.tensor([[[0.4], [-0.2]]]), torch.tensor([[1.0, 0.25]])
    returns, baseline = torch.tensor([[6.0, 2.0]]), torch.tensor([[1.0, 5.0]])
    rollout = Rollout(None, Choice(action, action), returns, returns, None)
    scale, alpha = torch.tensor(4.0), torch.tensor(0.3)
    target, config = Target(returns, weight), BehaviorConfig(gradient=gradient)
    dist = ActionDist.from_mean_std(mean, std)
    result = actor_loss(dist, rollout, target, baseline, scale, alpha, config)
    normal = Normal(mean, std)
    gain = returns / 4
    if gradient == "reinforce":
        gain = normal.log_prob(action).sum(-1) * (returns - baseline) / 4
    expected = -(weight * (gain + 0.3 * normal.entropy().sum(-1))).mean()
    torch.testing.assert_close(result, expected)


def settings(gradient: str) -> Config:
    """Nothing is 1 or 0 that can be another number; the starts are planned, and distilled."""
    behavior = {"horizon": HORIZON, "discount_horizon": 1 / (1 - GAMMA), "lam": LAM}
    config = agent_config(gradient=gradient, entropy=ALPHA, slow_scale=PULL, **behavior)
    return replace(
        config,
        plan=PlanConfig(candidates=3, horizon=2, imagine_fraction=0.0, imagine_rate=0.5),
        distill=DistillConfig(DISTILL, TAU),
    )


def awakened(gradient: str) -> Agent:
    torch.manual_seed(0)
    agent = Agent(VECTOR, settings(gradient))
    parts = (agent.world, agent.critic, agent.actor)
    perturb([x for part in parts for x in part.parameters()], 0.4)
    limit_two_hot_range(agent.world.reward, agent.critic.net, agent.critic.slow_net)
    agent.return_scale.range.fill_(SCALE)
    agent.return_scale.count.fill_(10_000)
    return agent


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_the_losses_of_an_agent(gradient: str, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = awakened(gradient)
    world, critic = agent.world, agent.critic
    chosen = record_results(monkeypatch, agent.learner, "choose_starts")
    imagined = record_results(monkeypatch, agent.behavior, "imagine")
    planned = record_results(monkeypatch, agent.behavior, "plan")
    batch, _ = random_batch(3, 4)
    batch.is_terminal[1, 2] = True
    with torch.no_grad():
        latent, _ = world.observe(batch)
    losses, _ = agent.learner.losses(latent, batch)
    [(rollout, acting)], [starts], [plan] = imagined, chosen, planned
    assert acting is None

    features = world.features(rollout.latent)
    slow, left = critic.slow_value(features), features[:, :-1].detach()
    returns, after = [], slow[:, -1]
    for h in reversed(range(HORIZON)):
        value = (1 - LAM) * slow[:, h + 1] + LAM * after
        after = rollout.reward[:, h] + GAMMA * rollout.cont[:, h] * value
        returns.insert(0, after)
    ret = torch.stack(returns, 1)
    reached = [(~batch.is_terminal).float().flatten()[starts]]
    for h in range(HORIZON - 1):
        reached.append(reached[-1] * GAMMA * rollout.cont[:, h].detach())
    weight, now = torch.stack(reached, 1), critic(left)
    likelihood = now.log_prob(ret.detach()) + PULL * now.log_prob(slow[:, :-1].detach())
    torch.testing.assert_close(losses["value"], -(weight * likelihood).mean())

    dist, scale = agent.actor(left), agent.return_scale.value
    assert 6 < scale < 8
    gain = ret / scale
    if gradient == "reinforce":
        advantage = ((ret - now.mean()) / scale).detach()
        gain = dist.log_prob(rollout.choice.action.detach()) * advantage
    expected = -(weight * (gain + ALPHA * dist.entropy())).mean()
    assert_same(agent, losses["policy"], expected)

    normal = Normal(dist.mean[:, None, 0], dist.std[:, None, 0].detach())
    log_prob = normal.log_prob(plan.candidates.choice.action[:, :, 0]).sum(-1)
    better = torch.softmax(plan.score / TAU, 1) - 1 / 3
    pulled = -(weight[:, 0] * TAU * (better * log_prob).sum(1)).sum()
    assert_same(agent, losses["distill"], DISTILL * pulled / weight.numel())


def assert_same(agent: Agent, loss: Tensor, expected: Tensor) -> None:
    """In value, and in the gradient of every weight of the actor."""
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-5)
    weights = list(agent.actor.parameters())
    mine, theirs = (torch.autograd.grad(x, weights, retain_graph=True) for x in (loss, expected))
    assert all(x.abs().max() > 1e-4 for x in theirs)
    torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-4)


def test_the_policy_reads_its_states_as_they_are() -> None:
    """An action changes what comes after it, not what the actor reads there."""
    agent = awakened("pathwise")
    start = Latent(torch.randn(3, 16, requires_grad=True), torch.rand(3, 3, 4))
    with frozen(agent.world), frozen(agent.actor):
        rollout, _ = agent.behavior.imagine(start, 2)
    assert rollout.reward.requires_grad and not rollout.choice.action.requires_grad


def test_the_slow_critic_follows_at_its_rate() -> None:
    torch.manual_seed(0)
    critic = Critic(5, BehaviorConfig(units=4, layers=1, bins=5, slow_rate=0.25), "rms")
    with torch.no_grad():
        for x in critic.net.parameters():
            x.add_(torch.randn_like(x))
    before = [x.clone() for x in critic.slow_net.parameters()]
    critic.follow()
    pairs = zip(before, critic.net.parameters(), strict=True)
    for mixed, (slow, fast) in zip(critic.slow_net.parameters(), pairs, strict=True):
        torch.testing.assert_close(mixed, 0.75 * slow + 0.25 * fast)
