"""The losses of MPDP in the agent, against the formulas written out, a state and a step at a time.

Of a rollout, states and noise are recorded. From these the tests walk every window anew, so that
gradients, too, can be compared.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from tiny import (
    VECTOR,
    agent_config,
    limit_two_hot_range,
    perturb,
    random_batch,
    record_results,
    world_config,
)
from torch import Tensor
from torch.distributions import Normal

from latentplan.agent import Agent
from latentplan.behavior import mpdp
from latentplan.behavior.planner import Plan
from latentplan.behavior.returns import lambda_returns
from latentplan.config.schema import Config, DistillConfig, MpdpConfig, PlanConfig
from latentplan.nn.action_distributions import ActionDist
from latentplan.types import Latent, Rollout, StepNoise, Timestep

HORIZON, SIZE, COUNT = 5, 2, 2  # of rollouts and their windows: one step is left over
GAMMA, LAM, ALPHA, BETA, THRESHOLD = 0.8, 0.7, 0.3, 0.6, 1.5
TAU, DISTILL, REPLAY, TARGET, PULL = 0.4, 0.7, 0.4, -1.5, 0.3
CANDIDATES = 3
CASES = [("per_step", 1), ("shared", 1), ("shared", CANDIDATES)]
EARLY, LATER = slice(None, -1), slice(1, None)


def settings(policies: str, candidates: int, adaptive: bool) -> Config:
    """Nothing is 1 or 0 that can be another number. States are soft: the model is smooth."""
    config = agent_config(
        world_config(anneal_updates=1000, member_per="step"),
        improvement="mpdp",
        gradient="pathwise",
        horizon=HORIZON,
        discount_horizon=1 / (1 - GAMMA),
        lam=LAM,
        entropy=ALPHA,
        std_max=0.4,
        target_entropy=TARGET,
        replay_scale=REPLAY,
        slow_scale=PULL,
    )
    return replace(
        config,
        mpdp=MpdpConfig(policies, SIZE, BETA, adaptive, THRESHOLD),
        # Followed to its end: plans at 0 and 3.
        plan=PlanConfig(candidates=candidates, horizon=3, imagine_rate=0.5),
        distill=DistillConfig(DISTILL if candidates > 1 else 0.0, TAU),
    )


def randomize_agent(agent: Agent) -> None:
    """Heads start at zero. Rewards and values of a few units, ends that are not certain, and U such
    that the threshold cuts about half of the windows."""
    torch.manual_seed(3)
    parts = (agent.world, agent.critic, agent.actor)
    perturb([x for part in parts for x in part.parameters()], 0.4)
    agent.world.cont.output.bias.data.fill_(1.0)
    limit_two_hot_range(agent.world.reward, agent.critic.net, agent.critic.slow_net)
    agent.return_scale.range.fill_(3.0)
    agent.return_scale.count.fill_(10_000)
    agent.uncertainty_scale.largest.fill_(0.113)


class Scene(NamedTuple):
    """The losses of an agent, and what they were made of: N states, rollouts of H steps."""

    agent: Agent
    own_rollout: bool  # the actor climbs a rollout of its own
    losses: dict[str, Tensor]
    replayed: Latent  # (B, T)
    batch: Timestep
    chosen: Tensor  # (N,) the replayed rows that imagination starts from
    rollout: Rollout  # (N, H)
    noise: Tensor  # (N, H, A) in the rollout that is climbed; apart, (N W, SIZE, A)
    drawn: StepNoise  # the randomness of the model in it
    rows: Tensor  # (R,) that are planned
    plans: dict[int, Plan]  # by step
    scale: Tensor  # S while the rollout is valued; the actor's is the agent's, updated

    def left(self, h: int) -> Latent:
        """(N) The states left at step h."""
        return self.rollout.latent.map(lambda x: x[:, h].detach())

    def policy(self, h: int) -> ActionDist:
        """(N) The first policy there."""
        return self.agent.actor(self.agent.world.features(self.left(h)))

    def slow(self, latent: Latent) -> Tensor:
        return self.agent.critic.slow_value(self.agent.world.features(latent))


def scene(policies: str, candidates: int = 1, adaptive: bool = True) -> Scene:
    torch.manual_seed(0)
    agent = Agent(VECTOR, settings(policies, candidates, adaptive))
    randomize_agent(agent)
    batch, _ = random_batch(3, 4)
    batch.is_terminal[1, 2] = True
    with torch.no_grad():
        latent, _ = agent.world.observe(batch)
    with pytest.MonkeyPatch.context() as patch:
        chosen = record_results(patch, agent.learner, "choose_starts")
        imagined = record_results(patch, agent.behavior, "imagine")
        planned = record_results(patch, agent.behavior, "plan")
        drawn = record_results(patch, agent.world, "draw_noise")
        own_rollout = record_results(patch, mpdp, "roll_out")
        before, (losses, _) = agent.return_scale.value, agent.learner.losses(latent, batch)
    [(rollout, acting)], [starts] = imagined, chosen
    rows = acting.rows if acting else torch.arange(len(starts) if planned else 0)
    plans = dict(acting.plans if acting else enumerate(planned))
    its = (own_rollout[0][0] if own_rollout else rollout).choice.noise, drawn[len(own_rollout)]
    made = losses, latent, batch, starts, rollout
    return Scene(agent, bool(own_rollout), *made, *its, rows, plans, before)


# --- by hand --------------------------------------------------------------------------------


def reached(s: Scene) -> Tensor:
    """(N, H) Discounted probability that a state is reached at all."""
    weight = [(~s.batch.is_terminal).float().flatten()[s.chosen]]
    for h in range(s.rollout.cont.shape[1] - 1):
        weight.append(weight[-1] * GAMMA * s.rollout.cont[:, h])
    return torch.stack(weight, 1).detach()


def walk(s: Scene, window: int) -> list[tuple[Tensor, ...]]:
    """The steps of a window from its first state on, with the gradient of every action: (N,)
    entropy, reward, uncertainty, continuation, and value on arriving."""
    begin, latent, world = window * SIZE, s.left(window * SIZE), s.agent.world
    if s.own_rollout:  # every window has a row of its own
        noise, drawn = s.noise[window::COUNT], [x[:, window::COUNT] for x in s.drawn]
    else:
        noise, drawn = s.noise[:, begin:], [x[begin:] for x in s.drawn]
    planned = torch.zeros(len(noise), dtype=torch.bool)
    planned[s.rows] = not s.own_rollout
    steps = []
    for i in range(SIZE):
        dist = s.agent.actor(world.features(latent), i if s.own_rollout else 0)
        std = torch.where(planned[:, None], dist.std.detach(), dist.std)
        followed = planned & (begin + i not in s.plans)  # no plan was made here
        entropy = torch.where(followed, dist.entropy().detach(), dist.entropy())
        result = world.step(
            latent, dist.mean + std * noise[:, i], StepNoise(*(x[i] for x in drawn))
        )
        uncertainty, latent = result.uncertainty / s.agent.uncertainty_scale.value, result.latent
        steps.append((entropy, result.reward, uncertainty, result.cont, s.slow(latent)))
    return steps


def objective(
    s: Scene, steps: list[tuple[Tensor, ...]], row: int, magnitude: Tensor
) -> tuple[Tensor, int]:
    """J of one state, and the number of steps taken."""
    scale, total, d, taken, end = s.agent.return_scale.value, 0.0, 1.0, 0, None
    for entropy, reward, uncertainty, cont, value in ([x[row] for x in step] for step in steps):
        if taken and s.agent.config.mpdp.adaptive_horizon and uncertainty > THRESHOLD:
            break
        total = total + d * ((reward - BETA * magnitude * uncertainty) / scale + ALPHA * entropy)
        d, end, taken = d * GAMMA * cont, value, taken + 1
    return total + d * end / scale, taken


def lessons(s: Scene) -> Tensor:
    """(N, H) What the candidates of a plan teach the deviation, each against all others."""
    taught = torch.zeros_like(s.rollout.reward)
    for h, plan in () if s.own_rollout else s.plans.items():
        _, choice, rewards, conts, _ = plan.candidates
        ret, d = 0.0, 1.0
        for reward, cont in zip(rewards.unbind(2), conts.unbind(2), strict=True):
            ret, d = ret + d * reward, d * GAMMA * cont
        ret = ret + d * s.slow(plan.candidates.latent.map(lambda x: x[:, :, -1]))
        ret, dist = (ret / s.agent.return_scale.value).detach(), s.policy(h)
        normal = Normal(dist.mean.detach()[s.rows], dist.std[s.rows])
        for k in range(CANDIDATES):
            others = torch.cat([ret[:, :k], ret[:, k + 1 :]], 1).mean(1)
            log_prob = normal.log_prob(choice.action[:, k, 0]).sum(-1)
            taught[s.rows, h] += log_prob * (ret[:, k] - others) / CANDIDATES
    return taught


def mean_reward(s: Scene) -> Tensor:
    """() What the steps of all windows earn, or cost: what uncertainty is weighed against."""
    rewards = [step[1].detach() for window in range(COUNT) for step in walk(s, window)]
    return torch.stack(rewards).abs().mean()


def climbed(s: Scene, magnitude: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """() What the actor climbs, and (N, W) the steps that each window takes."""
    magnitude = mean_reward(s) if magnitude is None else magnitude
    weight, taught = reached(s), lessons(s)
    gains, taken = [], torch.zeros(len(weight), COUNT, dtype=torch.int64)
    for window in range(COUNT):
        steps, begin = walk(s, window), window * SIZE
        for row in range(len(weight)):
            j, length = objective(s, steps, row, magnitude)
            there = slice(begin, begin + length)
            gains.append(weight[row, begin] * j + (weight[row, there] * taught[row, there]).sum())
            taken[row, window] = length
    return torch.stack(gains).mean(), taken


def pulled(s: Scene, taken: Tensor) -> Tensor:
    """() The distillation loss: the better candidates of every plan that is not beyond a cut."""
    weight, total = reached(s), 0.0
    for h, plan in s.plans.items():
        dist = s.policy(h)
        normal = Normal(dist.mean[s.rows, None], dist.std[s.rows, None].detach())
        log_prob = normal.log_prob(plan.candidates.choice.action[:, :, 0]).sum(-1)
        better = (plan.score / TAU).exp()
        better = better / better.sum(1, keepdim=True) - 1 / CANDIDATES
        counts = weight[s.rows, h] * (s.own_rollout or h % SIZE < taken[s.rows, h // SIZE])
        total = total - (counts * TAU * (better * log_prob).sum(1)).sum()
    return DISTILL * total / taken.numel()


def assert_same(s: Scene, loss: Tensor, expected: Tensor) -> None:
    """In value, and in the gradient of every weight of the actor."""
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-5)
    weights = list(s.agent.actor.parameters())
    mine, theirs = (torch.autograd.grad(x, weights, retain_graph=True) for x in (loss, expected))
    assert all(x.abs().max() > 1e-3 for x in theirs)
    torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-4)


# --- the losses -----------------------------------------------------------------------------


@pytest.mark.parametrize(("policies", "candidates"), CASES)
@pytest.mark.parametrize("adaptive", [True, False])
def test_the_policy_climbs_the_objective(policies: str, candidates: int, adaptive: bool) -> None:
    s = scene(policies, candidates, adaptive=adaptive)
    expected, taken = climbed(s)
    cut = (taken < SIZE).float().mean()
    assert 0.2 < cut < 0.8 if adaptive else cut == 0
    assert_same(s, s.losses["policy"], -expected)


@pytest.mark.parametrize("policies", ["per_step", "shared"])
def test_a_small_step_down_the_loss_raises_the_objective(policies: str) -> None:
    """On the same noise, from the same states, by what the gradient promises: all but a little, for
    actions are bounded and their gradients are not."""
    s = scene(policies, adaptive=False)
    weights, length = list(s.agent.actor.parameters()), 0.01
    gradient = torch.autograd.grad(s.losses["policy"], weights)
    slope = torch.cat([x.flatten() for x in gradient]).norm()
    with torch.no_grad():
        magnitude = mean_reward(s)  # a number, which no gradient passes
        before, _ = climbed(s, magnitude)
        torch._foreach_sub_(weights, [length * x / slope for x in gradient])
        after, _ = climbed(s, magnitude)
    torch.testing.assert_close(after - before, length * slope, atol=0.0, rtol=0.15)


@pytest.mark.parametrize("policies", ["per_step", "shared"])
def test_plans_pull_the_mean_of_the_policy(policies: str) -> None:
    s = scene(policies, CANDIDATES)
    assert list(s.plans) == ([0] if s.own_rollout else [0, 3])
    assert_same(s, s.losses["distill"], pulled(s, climbed(s)[1]))


def test_the_temperature_answers_to_the_entropy_of_the_first_policy() -> None:
    s = scene("per_step")
    entropy = torch.stack([s.policy(h).entropy() for h in range(HORIZON)]).mean()
    excess = entropy.detach() - TARGET * VECTOR.action_dim
    result = torch.autograd.grad(s.losses["temperature"], s.agent.temperature.log_alpha)
    torch.testing.assert_close(result, (excess,))


def likelihood(s: Scene, latent: Latent, returns: Tensor, weight: Tensor) -> Tensor:
    """() The critic's loss at latents (...), whose returns and weights are (...)."""
    dist = s.agent.critic(s.agent.world.features(latent))
    return -(weight * (dist.log_prob(returns) + PULL * dist.log_prob(s.slow(latent)))).mean()


@pytest.mark.parametrize(("policies", "candidates"), CASES)
def test_the_critic_learns_from_rows_that_the_policy_led(policies: str, candidates: int) -> None:
    """In imagination; and on replayed rows, of which only the policy's rollouts know the value."""
    s = scene(policies, candidates)
    led = torch.ones(len(s.chosen), dtype=torch.bool)
    led[s.rows] = False
    arrived, left = (s.rollout.latent.map(lambda x, t=t: x[:, t].detach()) for t in (LATER, EARLY))
    entropy = s.agent.actor(s.agent.world.features(left)).entropy()
    paid = s.rollout.reward + s.scale * ALPHA * entropy
    result = lambda_returns(paid, s.slow(arrived), GAMMA * s.rollout.cont, LAM).detach()
    expected = likelihood(s, left, result, reached(s) * led[:, None])
    torch.testing.assert_close(s.losses["value"], expected)

    value = s.slow(s.replayed).flatten().index_copy(0, s.chosen[led], result[led, 0])
    rows = s.replayed.map(lambda x: x[:, EARLY])
    entropy = s.agent.actor(s.agent.world.features(rows)).entropy()
    paid = s.batch.reward[:, LATER] + s.agent.return_scale.value * ALPHA * entropy
    value = value.view_as(s.batch.reward)[:, LATER]
    result = lambda_returns(paid, value, GAMMA * ~s.batch.is_terminal[:, LATER], LAM).detach()
    expected = REPLAY * likelihood(s, rows, result, torch.ones_like(result))
    torch.testing.assert_close(s.losses["repval"], expected)


@pytest.mark.parametrize(("policies", "candidates"), CASES)
def test_no_other_loss_moves_the_actor(policies: str, candidates: int) -> None:
    s = scene(policies, candidates)
    weights = [*s.agent.actor.parameters(), *s.agent.world.parameters()]
    for name in {"value", "repval", "temperature"}:
        result = torch.autograd.grad(s.losses[name], weights, allow_unused=True, retain_graph=True)
        assert not any(x is not None for x in result), name
    alpha = torch.autograd.grad(
        s.losses["policy"], s.agent.temperature.log_alpha, allow_unused=True
    )
    assert alpha == (None,)
