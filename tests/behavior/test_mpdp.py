"""MPDP on a linear-quadratic problem, whose soft-optimal policy is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from latentplan.behavior.conservative import leave_one_out_loss
from latentplan.behavior.imagination import imagine
from latentplan.behavior.losses import distillation_loss
from latentplan.behavior.mpdp import (
    improve,
    roll_out,
)
from latentplan.behavior.networks import Temperature
from latentplan.nn.action_distributions import ActionDist
from latentplan.types import Choice, Latent, Prediction, Rollout, StepNoise

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

        def policy(s: Latent, h: int) -> ActionDist:
            return ActionDist.from_mean_std(-gains[h] * s.deter, log_stds[h].exp().expand(256, 1))

        rollout, entropy = roll_out(step, policy, start, horizon, noise)
        value = -p * rollout.latent.deter[:, 1:, 0].square() + c
        result = improve(rollout, entropy, value, discount=GAMMA, alpha=ALPHA)
        optimizer.zero_grad()
        (-result.objective.mean()).backward()
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
    policy = lambda s, h: ActionDist.from_mean_std(weight * s.deter, (0.3 + weight).expand(50, 1))  # noqa: E731
    value = lambda s: -2.0 * s.square()[:, 0]  # noqa: E731
    rollout, entropy = roll_out(step, policy, latent(x), 1, noise)
    arrived = value(rollout.latent.deter[:, 1])[:, None]
    result = improve(rollout, entropy, arrived, discount=GAMMA, alpha=ALPHA)
    dist = policy(latent(x), 0)
    action = dist.rsample(noise[0])
    q = -(Q * x.square() + R * action.square())[:, 0] + GAMMA * value(A * x + B * action)
    sac = q + ALPHA * dist.entropy()
    torch.testing.assert_close(result.objective, sac)
    mine, theirs = (torch.autograd.grad(j.mean(), weight)[0] for j in (result.objective, sac))
    torch.testing.assert_close(mine, theirs)


def test_a_window_begins_like_a_rollout() -> None:
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
    uncertain = None if uncertainty is None else torch.tensor([uncertainty])
    states = Latent(torch.zeros(1, h + 1, 1), torch.zeros(1, h + 1, 1, 1))
    rewards = torch.tensor([[1.0, 2.0, 4.0]])
    return Rollout(states, Choice(zero, zero), rewards, torch.tensor([cont]), uncertain)


ENTROPY = torch.tensor([[0.5, 0.25, 0.125]])
VALUE = torch.tensor([[10.0, 20.0, 40.0]])


def test_the_rollout_is_cut_where_the_model_is_unsure() -> None:
    """In units of U = 2 the second step costs 3 > 2.5: its reward is dropped, and the value of the
    state that it would have left stands in."""
    result = improve(
        by_hand([1.0, 1.0, 1.0], [9.0, 6.0, 1.0]),
        ENTROPY,
        VALUE,
        discount=0.9,
        alpha=0.2,
        beta=0.1,
        threshold=2.5,
        reward_scale=2.0,
        uncertainty_scale=2.0,
        reward_magnitude=3.0,
    )
    assert result.taken.sum(1).tolist() == [1]  # the first step is always taken
    assert float(result.penalty) == pytest.approx(-0.1 * 3.0 / 2 * 4.5)
    expected = (1 - 0.1 * 3.0 * 4.5) / 2 + 0.2 * 0.5 + 0.9 * 10 / 2
    assert float(result.objective) == pytest.approx(expected)


def test_all_steps_are_taken_where_the_model_is_sure() -> None:
    result = improve(
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
    assert float(result.objective) == pytest.approx(expected) and result.taken.sum(1).tolist() == [
        3
    ]
    torch.testing.assert_close(result.entropy, ENTROPY[0])


def test_nothing_comes_after_an_end() -> None:
    result = improve(by_hand([1.0, 0.0, 1.0], None), ENTROPY, VALUE, discount=1.0, alpha=0.0)
    assert float(result.objective) == 3.0


def test_the_objective_needs_a_measured_uncertainty() -> None:
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
    dist = ActionDist.from_mean_std(mean, torch.full((500, 1), 0.5))
    action = 0.5 * torch.randn(500, 8, 1)
    distillation_loss(dist, action, torch.full((500, 8), 2.0), 1.0).sum().backward()
    assert mean.grad.abs().max() < 1e-5


def test_small_differences_are_distilled_as_the_policy_gradient_of_the_score() -> None:
    torch.manual_seed(0)
    mean = torch.zeros(50, 2, requires_grad=True)
    dist = ActionDist.from_mean_std(mean, torch.full((50, 2), 0.5))
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
