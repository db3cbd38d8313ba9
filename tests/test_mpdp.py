"""MPDP on a linear-quadratic problem, whose soft-optimal policy is known."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from tiny import VECTOR, agent_config, random_batch
from torch import Tensor

from latentplan.agent import Agent
from latentplan.behavior import learner
from latentplan.behavior.conservative import leave_one_out_loss
from latentplan.behavior.imagine import imagine
from latentplan.behavior.losses import distillation_loss
from latentplan.behavior.mpdp import (
    improve,
    roll_out,
)
from latentplan.behavior.nets import Temperature
from latentplan.config import load
from latentplan.nn.dists import ActionDist
from latentplan.schema import Config, DistillConfig, MpdpConfig, OptimConfig, PlanConfig
from latentplan.types import Choice, Latent, Prediction, Rollout, StepNoise, UserError

# x' = A x + B a, reward -(Q x^2 + R a^2), entropy worth ALPHA a nat.
A, B, Q, R, GAMMA, ALPHA = 1.1, 0.5, 1.0, 0.3, 0.9, 0.1


def latent(x: Tensor) -> Latent:
    return Latent(x, torch.zeros(len(x), 1, 1))


def step(state: Latent, action: Tensor, noise: StepNoise | None = None) -> Prediction:
    x, one = state.deter, torch.ones(len(action))
    reward = -(Q * x.square() + R * action.square())[:, 0]
    return Prediction(latent(A * x + B * action), reward, one, 0 * one)


def backup(p: float, c: float) -> tuple[float, float, float, float]:
    """Soft-optimal (gain, deviation) against V(x) = -p x^2 + c, and the new (p, c)."""
    curvature = R + GAMMA * p * B**2
    gain, std = GAMMA * p * A * B / curvature, math.sqrt(ALPHA / (2 * curvature))
    entropy = 0.5 * math.log(2 * math.pi * math.e * std**2)
    p_new = Q + R * gain**2 + GAMMA * p * (A - B * gain) ** 2
    return gain, std, p_new, GAMMA * c - curvature * std**2 + ALPHA * entropy


def evaluate(gain: float, std: float) -> tuple[float, float]:
    """V(x) = -p x^2 + c of the policy N(-gain x, std^2), entropy included."""
    closed = A - B * gain
    p = (Q + R * gain**2) / (1 - GAMMA * closed**2)
    entropy = 0.5 * math.log(2 * math.pi * math.e * std**2)
    c = (ALPHA * entropy - (R + GAMMA * p * B**2) * std**2) / (1 - GAMMA)
    return p, c


def soft_optimum() -> tuple[float, float]:
    p = c = 0.0
    for _ in range(500):
        gain, std, p, c = backup(p, c)
    return gain, std


def improved(p: float, c: float, horizon: int, updates: int = 400) -> tuple[Tensor, Tensor]:
    """Gains and deviations (H,) after gradient ascent on J from V(x) = -p x^2 + c."""
    gains = torch.full((horizon,), 0.3, requires_grad=True)
    log_stds = torch.full((horizon,), -0.5, requires_grad=True)
    optimizer = torch.optim.Adam([gains, log_stds], lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    generator = torch.Generator().manual_seed(0)
    for _ in range(updates):
        start = latent(torch.randn(256, 1, generator=generator))
        noise = torch.randn(horizon, 256, 1, generator=generator)
        policy = lambda s, h: ActionDist.of(-gains[h] * s.deter, log_stds[h].exp().expand(256, 1))  # noqa: E731
        rollout, entropy = roll_out(step, policy, start, horizon, noise)
        value = -p * rollout.latent.deter[:, 1:, 0].square() + c
        found = improve(rollout, entropy, value, discount=GAMMA, alpha=ALPHA)
        optimizer.zero_grad()
        (-found.objective.mean()).backward()
        optimizer.step()
        schedule.step()
    return gains.detach(), log_stds.detach().exp()


def test_a_longer_horizon_comes_closer_to_the_optimum() -> None:
    """From a bad value function: the first policy is the one of exact dynamic programming over H
    steps, and approaches the soft optimum."""
    gain, _ = soft_optimum()
    distances = []
    for horizon in (1, 2, 4):
        p, c = 0.2, 0.0
        for _ in range(horizon):
            expected_gain, expected_std, p, c = backup(p, c)
        gains, stds = improved(0.2, 0.0, horizon)
        assert float(gains[0]) == pytest.approx(expected_gain, abs=0.03)
        assert float(stds[0]) == pytest.approx(expected_std, abs=0.02)
        distances.append(abs(float(gains[0]) - gain))
    assert distances[0] > distances[1] > distances[2] and distances[2] < 0.1


@pytest.mark.parametrize("horizon", [1, 3])
def test_the_new_policy_is_nowhere_worse(horizon: int) -> None:
    """The paper's lemma, with exact policy evaluation: V_new >= V_old in every state."""
    p, c = evaluate(0.8, 0.5)
    gains, stds = improved(p, c, horizon)
    p_new, c_new = evaluate(float(gains[0]), float(stds[0]))
    assert p_new < p + 1e-3 and c_new > c - 1e-3


def test_improvement_and_evaluation_in_turns_reach_the_soft_optimum() -> None:
    gain, std = 0.5, 1.0
    for _ in range(4):
        p, c = evaluate(gain, std)
        gains, stds = improved(p, c, 2)
        gain, std = float(gains[0]), float(stds[0])
    best_gain, best_std = soft_optimum()
    assert gain == pytest.approx(best_gain, abs=0.03) and std == pytest.approx(best_std, abs=0.02)


def test_one_step_is_the_improvement_of_sac() -> None:
    """The gradient of E[Q(s, a)] + alpha H(pi(.|s)), Q = r + discount * cont * V."""
    weight = torch.tensor(0.4, requires_grad=True)
    x, noise = torch.randn(50, 1), torch.randn(1, 50, 1)
    policy = lambda s, h: ActionDist.of(weight * s.deter, (0.3 + weight).expand(50, 1))  # noqa: E731
    value = lambda s: -2.0 * s.square()[:, 0]  # noqa: E731
    rollout, entropy = roll_out(step, policy, latent(x), 1, noise)
    arrived = value(rollout.latent.deter[:, 1])[:, None]
    found = improve(rollout, entropy, arrived, discount=GAMMA, alpha=ALPHA)
    dist = policy(latent(x), 0)
    action = dist.rsample(noise[0])
    q = -(Q * x.square() + R * action.square())[:, 0] + GAMMA * value(A * x + B * action)
    sac = q + ALPHA * dist.entropy()
    torch.testing.assert_close(found.objective, sac)
    mine, theirs = (torch.autograd.grad(j.mean(), weight)[0] for j in (found.objective, sac))
    torch.testing.assert_close(mine, theirs)


def test_a_window_begins_as_another_rollout_would() -> None:
    """Steps 0, 1 make one window, 2, 3 the next: the first window's value still sees its own
    actions, but what happens later is not laid to their charge."""
    actions = torch.randn(5, 4, 1, requires_grad=True)
    act = lambda state, h: Choice(actions[:, h], actions[:, h])  # noqa: E731
    rollout = imagine(step, act, latent(torch.ones(5, 1)), 4, window=2)
    whole = imagine(step, act, latent(torch.ones(5, 1)), 4)
    for arrived, taught in ((2, [True, True, False, False]), (4, [False, False, True, True])):
        (grad,) = torch.autograd.grad(
            rollout.latent.deter[:, arrived].sum(), actions, retain_graph=True
        )
        assert (grad != 0).all((0, 2)).tolist() == taught
        torch.testing.assert_close(rollout.latent.deter, whole.latent.deter)


# --- by hand --------------------------------------------------------------------------------


def by_hand(cont: list[float], uncertainty: list[float] | None) -> Rollout:
    h = len(cont)
    zero = torch.zeros(1, h, 1)
    doubt = None if uncertainty is None else torch.tensor([uncertainty])
    states = Latent(torch.zeros(1, h + 1, 1), torch.zeros(1, h + 1, 1, 1))
    rewards = torch.tensor([[1.0, 2.0, 4.0]])
    return Rollout(states, Choice(zero, zero), rewards, torch.tensor([cont]), doubt)


ENTROPY = torch.tensor([[0.5, 0.25, 0.125]])
VALUE = torch.tensor([[10.0, 20.0, 40.0]])


def test_the_rollout_is_cut_where_the_model_is_unsure() -> None:
    """In units of U = 2 the second step costs 3 > 2.5: its reward is dropped, and the value of the
    state that it would have left stands in."""
    found = improve(
        by_hand([1.0, 1.0, 1.0], [9.0, 6.0, 1.0]),
        ENTROPY,
        VALUE,
        discount=0.9,
        alpha=0.2,
        beta=0.1,
        threshold=2.5,
        reward_scale=2.0,
        uncertainty_scale=2.0,
        price=3.0,
    )
    assert found.taken.sum(1).tolist() == [1]  # the first step is always taken
    assert float(found.penalty) == pytest.approx(-0.1 * 3.0 / 2 * 4.5)
    expected = (1 - 0.1 * 3.0 * 4.5) / 2 + 0.2 * 0.5 + 0.9 * 10 / 2
    assert float(found.objective) == pytest.approx(expected)


def test_all_steps_are_taken_where_the_model_is_sure() -> None:
    found = improve(
        by_hand([1.0, 1.0, 1.0], [1.0, 1.0, 1.0]),
        ENTROPY,
        VALUE,
        discount=0.5,
        alpha=1.0,
        beta=1.0,
        threshold=2.5,
    )
    steps = [r - 1.0 + h for r, h in zip((1.0, 2.0, 4.0), ENTROPY[0].tolist(), strict=True)]
    expected = steps[0] + 0.5 * steps[1] + 0.25 * steps[2] + 0.125 * 40
    assert float(found.objective) == pytest.approx(expected) and found.taken.sum(1).tolist() == [3]
    torch.testing.assert_close(found.entropy, ENTROPY[0])


def test_nothing_comes_after_an_end() -> None:
    found = improve(by_hand([1.0, 0.0, 1.0], None), ENTROPY, VALUE, discount=1.0, alpha=0.0)
    assert float(found.objective) == 3.0


def test_doubt_must_be_measured_to_be_used() -> None:
    for asked in ({"beta": 0.1}, {"threshold": 1.0}):
        with pytest.raises(ValueError, match="uncertainty"):
            improve(by_hand([1.0] * 3, None), ENTROPY, VALUE, discount=1.0, alpha=0.0, **asked)


# --- temperature and distillation -----------------------------------------------------------


def test_the_temperature_rises_while_the_entropy_is_low() -> None:
    for entropy, rises in ((-3.0, True), (3.0, False)):
        temperature = Temperature(0.1, target=-1.0)
        temperature.loss(torch.tensor([entropy])).backward()
        assert (float(temperature.log_alpha.grad) < 0) == rises
    fixed = Temperature(0.1, target=None)
    assert not fixed.log_alpha.requires_grad and float(fixed.value) == pytest.approx(0.1)


def test_distillation_raises_the_better_candidates() -> None:
    raw = torch.zeros(1, 2, requires_grad=True)
    action, score = torch.tensor([[[-0.5], [0.1], [0.7]]]), torch.tensor([[0.0, 1.0, 3.0]])
    before = ActionDist(raw, 0.1, 1.0)
    distillation_loss(before, action, score, 0.5).sum().backward()
    after = ActionDist(raw - 0.01 * raw.grad, 0.1, 1.0)
    change = (after.log_prob(action[0]) - before.log_prob(action[0])).detach()
    assert change[2] > 0 > change[0]


def test_equal_candidates_distil_nothing() -> None:
    mean = torch.zeros(500, 1, requires_grad=True)
    dist = ActionDist.of(mean, torch.full((500, 1), 0.5))
    action = 0.5 * torch.randn(500, 8, 1)
    distillation_loss(dist, action, torch.full((500, 8), 2.0), 1.0).sum().backward()
    assert mean.grad.abs().max() < 1e-5


def test_small_differences_are_distilled_as_the_policy_gradient_of_the_score() -> None:
    torch.manual_seed(0)
    mean = torch.zeros(50, 2, requires_grad=True)
    dist = ActionDist.of(mean, torch.full((50, 2), 0.5))
    action, score = 0.5 * torch.randn(50, 4, 2), 1e-3 * torch.randn(50, 4)
    distilled, policy = (
        torch.autograd.grad(loss.sum(), mean)[0]
        for loss in (
            distillation_loss(dist, action, score, 0.5),
            leave_one_out_loss(dist, action, score),
        )
    )
    torch.testing.assert_close(distilled, (1 - 1 / 4) * policy, rtol=0.01, atol=1e-6)


def test_a_linear_score_does_not_widen_the_policy() -> None:
    """The better half of the samples lies to one side of the mean: about it, they spread wider."""
    torch.manual_seed(0)
    raw = torch.zeros(1, 2, requires_grad=True)
    dist = ActionDist(raw.expand(20_000, 2), 0.1, 1.0)
    action = dist.rsample(torch.randn(4, 20_000, 1)).detach().transpose(0, 1)
    distillation_loss(dist, action, action[..., 0], 0.05).mean().backward()
    mean, std = raw.grad[0]
    assert mean < -0.01 and std == 0


# --- in the agent ---------------------------------------------------------------------------


def settings(policies: str = "per_step", candidates: int = 1, **behavior: object) -> Config:
    config = agent_config(improvement="mpdp", gradient="pathwise", **behavior)
    return replace(
        config,
        mpdp=MpdpConfig(policies=policies, horizon=2),
        plan=PlanConfig(candidates=candidates, horizon=2),
        distill=DistillConfig(weight=0.5 if candidates > 1 else 0.0),
    )


def test_only_mpdp_takes_a_share_of_the_entropy_bonus() -> None:
    config = settings()
    config = replace(config, mpdp=replace(config.mpdp, entropy_share=0.25))
    other = replace(config, behavior=replace(config.behavior, improvement="dreamer"))
    alpha, whole = (Agent(VECTOR, x).temperature.value for x in (config, other))
    torch.testing.assert_close(whole, torch.tensor(config.behavior.entropy))
    torch.testing.assert_close(alpha, 0.25 * whole)


CASES = [("per_step", 1), ("shared", 1), ("per_step", 3), ("shared", 3)]


@pytest.mark.parametrize(("policies", "candidates"), CASES)
def test_an_update_moves_every_weight(policies: str, candidates: int) -> None:
    torch.manual_seed(0)
    agent = Agent(VECTOR, settings(policies, candidates, target_entropy=-1.0))
    before = {name: x.clone() for name, x in agent.named_parameters() if x.requires_grad}
    for seed in range(3):
        metrics = agent.update(*random_batch(3, 4, seed=seed))
    assert all(x.isfinite().all() for x in metrics.values())
    assert 1 <= metrics["train/mpdp/horizon"] <= 2
    still = [
        name
        for name, x in agent.named_parameters()
        if name in before and torch.equal(x, before[name])
    ]
    assert not still
    if policies == "per_step":  # each of the two policies, not only their stack
        for name, x in agent.actor.named_parameters():
            moved = (x != before[f"actor.{name}"]).flatten(1).any(1)
            assert moved.tolist() == [True, True], name


def test_the_temperature_moves_at_its_own_rate() -> None:
    torch.manual_seed(0)
    optim = OptimConfig(actor_lr=1e-6, temperature_lr=0.02, warmup=1)
    agent = Agent(VECTOR, replace(settings("shared", 1, target_entropy=5.0), optim=optim))
    before = agent.temperature.log_alpha.item()
    agent.update(*random_batch(3, 4))  # at first LaProp moves everything by its whole rate
    assert agent.temperature.log_alpha.item() - before == pytest.approx(0.02, rel=1e-3)


@pytest.mark.parametrize(("policies", "candidates"), CASES)
def test_the_policy_loss_reaches_the_actor_alone(policies: str, candidates: int) -> None:
    torch.manual_seed(0)
    agent = Agent(VECTOR, settings(policies, candidates))
    awaken(agent)
    batch, _ = random_batch(3, 4)
    with torch.no_grad():
        latent, _ = agent.world.observe(batch)
    losses, _ = agent.learner.losses(latent, batch)
    (losses["policy"] + losses.get("distill", 0.0)).backward()
    touched = {name.split(".")[0] for name, p in agent.named_parameters() if p.grad is not None}
    assert touched == {"actor"}


def awaken(agent: Agent) -> None:
    """Heads start at zero, where nothing is worth more than anything else."""
    with torch.no_grad():
        for x in agent.parameters():
            x.add_(0.3 * torch.randn_like(x))


def test_the_first_policy_acts() -> None:
    torch.manual_seed(0)
    agent = Agent(VECTOR, settings())
    awaken(agent)
    row, carry = random_batch(5, 1)[0].map(lambda x: x[:, 0]), agent.initial(5)
    action, latent = agent.act(row, carry, "mean")
    features = agent.world.features(latent)
    torch.testing.assert_close(action, agent.actor(features, 0).mode)
    assert not torch.allclose(action, agent.actor(features, 1).mode)


def test_the_critic_learns_the_soft_value() -> None:
    """The same agent, paid more for its entropy, expects more."""
    returns = []
    for entropy in (0.01, 5.0):
        torch.manual_seed(0)
        agent = Agent(VECTOR, settings(entropy=entropy))
        metrics = agent.update(*random_batch(3, 4))
        returns.append(float(metrics["train/critic/return"]))
    assert returns[1] > returns[0] + 5


def captured(monkeypatch: pytest.MonkeyPatch, name: str) -> list[tuple]:
    """The arguments of every call of a function that the learner uses."""
    calls: list[tuple] = []
    real = getattr(learner, name)
    monkeypatch.setattr(learner, name, lambda *args: calls.append(args) or real(*args))
    return calls


def test_the_critic_values_the_policy_and_not_the_planner(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = captured(monkeypatch, "critic_loss")
    for improvement, planned in (("mpdp", True), ("dreamer", False)):
        config = settings("shared", 3, replay_scale=0.0)
        behavior = replace(config.behavior, improvement=improvement)
        agent = Agent(VECTOR, replace(config, behavior=behavior))
        agent.update(*random_batch(5, 4))
        ignored = (calls.pop()[3] == 0).all(1)
        assert ignored.sum() == (len(ignored) / 2 if planned else 0)


def test_the_critic_follows_the_first_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    agent = Agent(VECTOR, settings())
    asked, real = [], agent.actor.forward
    monkeypatch.setattr(agent.actor, "forward", lambda x, h=0: asked.append(h) or real(x, h))
    agent.behavior.imagine(agent.world.initial(4), 3)
    assert asked == [0, 0, 0]


def test_entropy_is_paid_in_replay_on_leaving_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = captured(monkeypatch, "replay_returns")
    torch.manual_seed(0)
    agent = Agent(VECTOR, settings(entropy=0.3, replay_scale=1.0))
    awaken(agent)
    agent.scale.range.fill_(7.0)
    batch, _ = random_batch(3, 4)
    with torch.no_grad():
        latent, _ = agent.world.observe(batch)
        entropy = agent.actor(agent.world.features(latent)).entropy()
    agent.learner.losses(latent, batch)
    paid = calls[0][0] - batch.reward
    expected = agent.scale.value * 0.3 * entropy[:, :-1]
    torch.testing.assert_close(paid[:, 1:], expected)
    assert not paid[:, 0].any()


def test_the_entropy_of_a_step_is_that_of_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of them are planned, and a followed candidate teaches nothing at the second step."""
    torch.manual_seed(0)
    metrics = Agent(VECTOR, settings("shared", 3)).update(*random_batch(3, 4))
    first, second = (float(metrics[f"train/mpdp/entropy_{h}"]) for h in (0, 1))
    assert second == pytest.approx(first, rel=0.01)  # untrained, the policy is the same everywhere


def test_plans_beyond_the_cut_distil_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for threshold, taught in ((1e9, [True, True]), (1e-9, [True, False])):
        torch.manual_seed(0)
        config = settings("shared", 3)
        config = replace(
            config,
            mpdp=replace(config.mpdp, threshold=threshold),
            plan=replace(config.plan, replan_every=1),
        )
        agent = Agent(VECTOR, config)
        weights, real = [], agent.learner._distill
        monkeypatch.setattr(
            agent.learner, "_distill", lambda *x, seen=weights, f=real: seen.append(x[2]) or f(*x)
        )
        agent.update(*random_batch(3, 4))
        learned = (weights[0] > 0).any(0).tolist()
        whole, rest = divmod(config.behavior.horizon, 2)
        assert learned == taught * whole + [False] * rest


def test_distance_is_that_of_the_choice_from_the_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    """In nats: an action three deviations off is 4.5 - 0.5 less likely than a sample, in the mean;
    the mean itself 0.5 more, for each dimension."""
    for far, nats in ((3.0, 4.0), (0.0, -0.5)):
        torch.manual_seed(0)
        config = replace(agent_config(), plan=PlanConfig(candidates=3, horizon=2))
        agent = Agent(VECTOR, config)
        real = agent.behavior.plan

        def plan(latent: Latent, *rest: float, far: float = far, f: object = real, **more: object):
            dist = agent.behavior.policy(latent)  # noqa: B023
            return f(latent, *rest, **more)._replace(action=dist.mean + far * dist.std)

        monkeypatch.setattr(agent.behavior, "plan", plan)
        metrics = agent.update(*random_batch(3, 4))
        assert float(metrics["train/plan/distance"]) == pytest.approx(2 * nats, abs=0.05)


def test_what_makes_no_sense_is_refused() -> None:
    for mistake in (
        ["behavior.improvement=mpdp"],
        ["ablation=mpdp_shared", "mpdp.horizon=99"],
        ["ablation=mpdp", "behavior.horizon=3"],
        ["distill.weight=1"],
        ["ablation=mpdp", "plan.candidates=4", "plan.imagine_share=0.5"],
        ["ablation=latentplan", "plan.imagine_share=1"],
        ["ablation=mpdp", "world.members=1"],
        ["ablation=mpdp", "behavior.entropy=0.1"],
    ):
        with pytest.raises(UserError):
            load([], ["size=cpu", *mistake])


def test_distilling_starts_only_needs_no_planned_rollout() -> None:
    torch.manual_seed(0)
    config = agent_config()
    config = replace(
        config,
        plan=PlanConfig(candidates=3, horizon=2, imagine_share=0.0),
        distill=DistillConfig(weight=1.0),
    )
    metrics = Agent(VECTOR, config).update(*random_batch(3, 4))
    assert metrics["train/loss/distill"].isfinite() and metrics["train/plan/distance"].isfinite()
