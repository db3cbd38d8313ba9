"""What the actor learns where a planner chose among its samples."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import VECTOR, agent_config, limit_two_hot_range, perturb, random_batch, select_rows
from torch import Tensor

from latentplan.agent import Agent
from latentplan.behavior import learner as learner_module
from latentplan.behavior.behavior import Behavior
from latentplan.behavior.conservative import (
    PlannedActing,
    learn_from_plans,
    leave_one_out_loss,
)
from latentplan.behavior.imagination import imagine
from latentplan.behavior.losses import actor_loss, make_target
from latentplan.behavior.planner import Plan, plan
from latentplan.behavior.returns import discounts
from latentplan.config.loading import load
from latentplan.config.schema import BehaviorConfig, Config, DistillConfig, PlanConfig
from latentplan.nn.action_distributions import ActionDist
from latentplan.types import Choice, Latent, Prediction, StepNoise


def gradient(mean: float, std: float, score: str, seed: int = 0) -> tuple[float, float]:
    """Of the leave-one-out loss with respect to (mean, std), over many states of one kind."""
    mu, sigma = (torch.full((), x, requires_grad=True) for x in (mean, std))
    n, k = 200_000, 4
    dist = ActionDist.from_mean_std(mu.expand(n, 1), sigma.expand(n, 1))
    noise = torch.randn(n, k, 1, generator=torch.Generator().manual_seed(seed))
    action = (mean + std * noise).detach()
    value = action if score == "linear" else -action.square()
    leave_one_out_loss(dist, action, value[..., 0]).mean().backward()
    return float(mu.grad), float(sigma.grad)


def test_leave_one_out_is_the_gradient_of_the_expected_return() -> None:
    """E[a] = mean; E[-a^2] = -(mean^2 + std^2)."""
    assert gradient(0.3, 0.5, "linear") == pytest.approx((-1.0, 0.0), abs=0.02)
    assert gradient(0.3, 0.5, "quadratic") == pytest.approx((0.6, 1.0), abs=0.02)


def test_equal_candidates_teach_nothing() -> None:
    dist = ActionDist.from_mean_std(torch.zeros(3, 1, requires_grad=True), torch.ones(3, 1))
    loss = leave_one_out_loss(dist, torch.randn(3, 4, 1), torch.full((3, 4), 7.0))
    assert not torch.autograd.grad(loss.sum(), dist.mean)[0].any()


def test_a_return_that_is_not_finite_teaches_nothing() -> None:
    dist = ActionDist.from_mean_std(torch.zeros(2, 1, requires_grad=True), torch.ones(2, 1))
    ret = torch.tensor([[1.0, torch.nan, 2.0], [1.0, 3.0, 2.0]])
    loss = leave_one_out_loss(dist, torch.randn(2, 3, 1), ret)
    grad = torch.autograd.grad(loss.sum(), dist.mean)[0]
    assert grad[0] == 0 and grad[1] != 0


def deviation_gradient(
    planned: bool, gradient: str, entropy: float = 0.0, every: int = 1
) -> Tensor:
    """(H,) Of the actor's whole loss with respect to the deviation at each step; -a^2 is paid."""
    torch.manual_seed(0)
    n, horizon, lam = 30_000, 6, 0.9
    std = torch.full((horizon,), 0.5, requires_grad=True)

    def policy(state: Latent) -> ActionDist:
        shape = state.deter.shape[:-1]
        h = int(state.stoch.flatten()[0])
        return ActionDist.from_mean_std(torch.zeros(*shape, 1), std[h].expand(*shape, 1))

    def squares(state: Latent, action: Tensor, noise: StepNoise | None = None) -> Prediction:
        one = torch.ones(len(action))
        return Prediction(state._replace(stoch=state.stoch + 1), -action[:, 0].square(), one, one)

    def search(state: Latent, first: ActionDist) -> Plan:
        steps = min(every, horizon - int(state.stoch.flatten()[0]))
        return plan(squares, policy, state, first=first, candidates=4, horizon=steps, optimism=0.0)

    def sample(state: Latent, h: int) -> Choice:
        dist = policy(state)
        noise = torch.randn_like(dist.mean)
        return Choice(dist.rsample(noise), noise)

    acting = PlannedActing(policy, search, torch.arange(n), every) if planned else None
    rollout = imagine(squares, acting or sample, start(n), horizon)
    zero = torch.zeros(n, horizon)
    target = make_target(rollout, zero, torch.ones(n), 1.0, lam)
    dist = ActionDist.from_mean_std(torch.zeros(n, horizon, 1), std[:, None].expand(n, horizon, 1))
    learned = None
    if acting:
        at_end = lambda state: torch.zeros(state.deter.shape[:-1])  # noqa: E731
        pathwise = lam if gradient == "pathwise" else None
        learned = learn_from_plans(acting, dist, at_end, torch.ones(()), 1.0, pathwise)
    config = BehaviorConfig(gradient=gradient)
    loss = actor_loss(
        dist, rollout, target, zero, torch.ones(()), torch.tensor(entropy), config, learned
    )
    return torch.autograd.grad(loss, std)[0] * horizon


@pytest.mark.parametrize("gradient", ["reinforce", "pathwise"])
def test_planned_and_own_rows_teach_the_deviation_the_same(gradient: str) -> None:
    """E[-a^2] = -std^2 at every step. A pathwise loss counts a reward in all returns before it, so
    planned rows must, or there the entropy bonus would win."""
    own, planned = (deviation_gradient(x, gradient) for x in (False, True))
    torch.testing.assert_close(planned, own, atol=0.12, rtol=0.1)
    counted = torch.ones(6) if gradient == "reinforce" else (0.9 ** torch.arange(6)).cumsum(0)
    torch.testing.assert_close(planned, counted, atol=0.12, rtol=0.1)


@pytest.mark.parametrize("gradient", ["reinforce", "pathwise"])
def test_entropy_is_paid_where_something_is_learned(gradient: str) -> None:
    """A candidate that is followed for three steps teaches at the first: entropy alone would widen
    the policy at the others."""
    plain, paid = (deviation_gradient(True, gradient, x, every=3) for x in (0.0, 1.0))
    assert (plain[[1, 2, 4, 5]] == 0).all() and (plain[[0, 3]] > 0).all()
    difference = paid - plain
    assert (difference[[1, 2, 4, 5]] == 0).all()
    torch.testing.assert_close(difference[[0, 3]], torch.full((2,), -2.0))  # -d/dstd log std


# --- acting ---------------------------------------------------------------------------------


def step(state: Latent, action: Tensor, noise: StepNoise | None = None) -> Prediction:
    """x' = x + a pays a: the score is linear in the actions."""
    x, one = state.deter + action, torch.ones(len(action))
    return Prediction(Latent(x, state.stoch), action[:, 0], one, one)


def acting(rows: list[int], every: int, mean: Tensor, std: Tensor) -> PlannedActing:
    def policy(state: Latent) -> ActionDist:
        return ActionDist.from_mean_std(
            mean.expand(len(state.deter), 1), std.expand(len(state.deter), 1)
        )

    def planned(state: Latent, first: ActionDist) -> Plan:
        return plan(step, policy, state, first=first, candidates=8, horizon=4, optimism=0.0)

    return PlannedActing(policy, planned, torch.tensor(rows), every)


def start(n: int) -> Latent:
    return Latent(torch.zeros(n, 1), torch.zeros(n, 1, 1))


def test_chosen_noise_does_not_widen_the_policy() -> None:
    """On a linear score the deviation is worth nothing. Through the chosen noise, which leans
    upwards, it would seem to be; the mean learns as it should."""
    torch.manual_seed(0)
    mean, std = torch.zeros((), requires_grad=True), torch.full((), 0.5, requires_grad=True)
    n = 400
    act = acting(list(range(n)), 1, mean, std)
    rollout = imagine(step, act, start(n), 3)
    assert rollout.choice.noise.mean() > 0.5  # chosen, hence far from standard normal
    grads = torch.autograd.grad(rollout.reward.mean(), (mean, std), allow_unused=True)
    assert float(grads[0]) == pytest.approx(1.0) and not grads[1]


def test_rows_that_are_not_planned_sample_the_policy() -> None:
    torch.manual_seed(0)
    mean, std = torch.zeros((), requires_grad=True), torch.full((), 0.5, requires_grad=True)
    n = 4000
    act = acting(list(range(0, n, 2)), 1, mean, std)
    rollout = imagine(step, act, start(n), 1)
    free = rollout.choice.noise[1::2]
    assert abs(float(free.mean())) < 0.06 and float(free.std()) == pytest.approx(1, abs=0.05)
    std_gradient = torch.autograd.grad(rollout.reward[1::2].sum(), std)[0]
    torch.testing.assert_close(std_gradient, free.sum())


def test_between_plans_the_chosen_candidate_is_followed() -> None:
    mean, std = torch.zeros(()), torch.ones(())
    act = acting([0, 2], 3, mean, std)
    rollout = imagine(step, act, start(3), 6)
    assert [h for h, _ in act.plans] == [0, 3]
    for h, result in act.plans:
        torch.testing.assert_close(rollout.choice.noise[[0, 2], h : h + 3], result.noise[:, :3])


# --- in the agent ---------------------------------------------------------------------------


def config(gradient: str = "reinforce", **changes: object) -> Config:
    faithful = PlanConfig(candidates=3, horizon=2, imagine_fraction=1.0, replan_every=1)
    plan_config = replace(faithful, **changes)
    return replace(agent_config(gradient=gradient), plan=plan_config)


def agent(settings: Config, seed: int = 0) -> Agent:
    torch.manual_seed(seed)
    return Agent(VECTOR, settings)


def weights_after_an_update(settings: Config) -> dict[str, Tensor]:
    learner = agent(settings)
    torch.manual_seed(1)
    learner.update(*random_batch(3, 4))
    return learner.state_dict()


@pytest.mark.parametrize("gradient", ["reinforce", "pathwise"])
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_planned_update_moves_every_weight(gradient: str, share: float) -> None:
    learner = agent(config(gradient, imagine_fraction=share))
    before = {name: x.clone() for name, x in learner.named_parameters() if x.requires_grad}
    for seed in range(2):  # zero output layers let gradients through from the second update on
        metrics = learner.update(*random_batch(3, 4, seed=seed))
    assert all(torch.isfinite(x) for x in metrics.values())
    assert 0 <= metrics["train/plan/imagine_bonus_share"] <= 1
    assert metrics["train/plan/imagine_invalid"] == 0
    still = [
        name
        for name, x in learner.named_parameters()
        if name in before and torch.equal(x, before[name])
    ]
    assert not still


@pytest.mark.parametrize("gradient", ["reinforce", "pathwise"])
def test_one_candidate_is_plain_dreamer(gradient: str) -> None:
    plain = weights_after_an_update(agent_config(gradient=gradient))
    one = weights_after_an_update(config(gradient, candidates=1, imagine_rate=9.0))
    none = weights_after_an_update(config(gradient, imagine_fraction=0.0))
    for name, x in plain.items():
        assert torch.equal(x, one[name]) and torch.equal(x, none[name]), name


@pytest.mark.parametrize(
    "changes",
    [
        {"imagine_rate": -0.5},
        {"imagine_fraction": 0.5},
        {"value": False},
        {"discount": False},
        {"normalize_reward": False},
        {"normalize_uncertainty": False},
        {"replan_every": 2},
        {"horizon": 3},
        {"candidates": 4},
    ],
    ids=str,
)
def test_every_switch_changes_what_is_learned(changes: dict[str, object]) -> None:
    one, other = (weights_after_three(informative(**x)) for x in ({}, changes))
    assert any(not torch.equal(x, other[name]) for name, x in one.items() if "actor" in name)


def informative(**changes: object) -> Config:
    """Where every term of the score matters."""
    settings = config(**{"imagine_rate": 1.0, "candidates": 8, **changes})
    return replace(settings, behavior=replace(settings.behavior, discount_horizon=2.0))


@pytest.mark.parametrize(("gradient", "lam"), [("reinforce", None), ("pathwise", 0.7)])
def test_plans_teach_by_the_returns_that_the_policy_climbs(
    gradient: str, lam: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def teach(*arguments: object) -> object:
        asked.append(arguments[-1])
        return learn_from_plans(*arguments)

    monkeypatch.setattr(learner_module, "learn_from_plans", teach)
    settings = config(gradient)
    settings = replace(settings, behavior=replace(settings.behavior, lam=0.7))
    agent(settings).update(*random_batch(3, 4))
    assert asked == [lam]


@pytest.mark.parametrize(
    "changes",
    [{}, {"normalize_reward": False}, {"normalize_uncertainty": False}, {"discount": False}],
    ids=str,
)
def test_a_plan_is_scored_in_the_units_asked_for(changes: dict[str, bool]) -> None:
    learner = agent(informative(horizon=2, **changes))
    perturb(learner.parameters(), 0.5)
    limit_two_hot_range(
        learner.world.reward, learner.critic.slow_net
    )  # or uncertainty would not be seen
    learner.return_scale.range.fill_(3.0)
    learner.return_scale.count.fill_(10_000)
    learner.uncertainty_scale.largest.fill_(0.2)
    scale = learner.return_scale.value if changes.get("normalize_reward", True) else 1.0
    units = 0.2 if changes.get("normalize_uncertainty", True) else 1.0
    gamma = 0.5 if changes.get("discount", True) else 1.0
    result = learner.behavior.plan(Latent(torch.randn(6, 16).tanh(), torch.rand(6, 3, 4)), -0.7)
    c = result.candidates
    weight = torch.stack([torch.ones(6, 8), gamma * c.cont[..., 0]], -1)
    end = learner.behavior.value(c.latent.map(lambda x: x[:, :, -1]))
    gain = (weight * c.reward).sum(-1) + gamma**2 * c.cont.prod(-1) * end
    penalty = 0.7 * (weight * c.uncertainty).sum(-1) / units
    assert (penalty > 0.01 * (gain / scale).abs()).float().mean() > 0.5
    torch.testing.assert_close(result.score, gain / scale - penalty)


def weights_after_three(settings: Config) -> dict[str, Tensor]:
    learner = agent(settings)
    perturb(learner.parameters(), 0.5)
    torch.manual_seed(1)
    for seed in range(3):
        learner.update(*random_batch(8, 6, seed=seed))
    return learner.state_dict()


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_imagination_penalizes_uncertainty_and_exploration_rewards_it(share: float) -> None:
    settings = config(imagine_rate=0.7, imagine_fraction=share)
    learner = agent(replace(settings, distill=DistillConfig(weight=1.0)))
    asked = []
    learner.behavior.plan = lambda latent, optimism, *rest, **more: (
        asked.append(optimism) or real(latent, optimism, *rest, **more)
    )
    real = Behavior.plan.__get__(learner.behavior)
    learner.update(*random_batch(4, 4))
    assert asked and set(asked) == {-0.7}


def test_the_replan_interval_saves_plans() -> None:
    counts = []
    for every in (1, 2, 0):
        learner = agent(config(replan_every=every))
        latent = learner.world.initial(6)
        counts.append(len(learner.behavior.imagine(latent, 4)[1].plans))
    assert counts == [4, 2, 2]  # 0: as long as a plan is


# --- in the environment ---------------------------------------------------------------------


def row(n: int = 5) -> object:
    return select_rows(random_batch(n, 1)[0], 0)


def test_exploration_plans_and_evaluation_does_not() -> None:
    learner = agent(config(explore_rate=3.0))
    asked = []
    learner.behavior.plan = lambda latent, optimism, *rest: (
        asked.append(optimism) or real(latent, optimism, *rest)
    )
    real = Behavior.plan.__get__(learner.behavior)
    action, _, _, metrics = learner.explore(row(), learner.initial(5))
    assert action.shape == (5, 2) and action.abs().max() <= 1
    assert 0 < metrics["train/plan/explore_bonus_share"] <= 1
    for mode in ("mean", "sample", "planner"):
        learner.act(row(), learner.initial(5), mode)
    assert asked == [3.0, 0.0]


def test_no_environment_keeps_a_member() -> None:
    """Rows are dealt out to members in blocks, and five environments are five blocks."""
    learner, order = agent(config()), []
    going_on = row()._replace(is_first=torch.zeros(5, dtype=torch.bool))
    carry = Latent(torch.randn(5, 16).tanh(), torch.rand(5, 3, 4))
    real = Behavior.plan.__get__(learner.behavior)

    def plan(latent: Latent, *rest: float) -> Plan:
        order.append(latent.deter[:, 0])
        return real(latent, *rest)._replace(action=latent.deter[:, :2])  # whose it is

    learner.behavior.plan = plan
    for _ in range(40):
        action, latent, *_ = learner.explore(going_on, carry)
        assert torch.equal(action, latent.deter[:, :2])
        order[-1] = (order[-1][:, None] == latent.deter[:, 0]).int().argmax(1)
    assert torch.stack(order)[:, 0].unique().tolist() == [0, 1, 2, 3, 4]


def test_coplanner_without_rates_and_value_is_best_of_k_by_reward() -> None:
    """The ablation as its file has it, both rates 0."""
    asked = ["ablation=coplanner", "plan.explore_rate=0", "plan.imagine_rate=0", "plan.value=false"]
    settings = load([], ["size=tiny", *asked]).plan
    learner = agent(replace(agent_config(), plan=settings))
    perturb(learner.parameters(), 0.5)
    latent = Latent(torch.randn(40, 16).tanh(), torch.rand(40, 3, 4))
    for rate in (settings.explore_rate, -settings.imagine_rate):
        result = learner.behavior.plan(latent, rate)
        weight, _ = discounts(result.candidates.cont, learner.config.behavior.discount)
        best = (weight * result.candidates.reward).sum(-1).argmax(1)
        assert result.score.shape == (40, 4) and torch.equal(result.best, best)
        assert result.best.unique().numel() == 4


@pytest.mark.parametrize("changes", [{"explore": False}, {"candidates": 1}])
def test_exploration_works_without_a_planner(changes: dict[str, object]) -> None:
    learner = agent(config(**changes))
    torch.manual_seed(1)
    sampled, _ = learner.act(row(), learner.initial(5))
    learner.behavior.plan = None
    torch.manual_seed(1)
    action, _, _, metrics = learner.explore(row(), learner.initial(5))
    assert torch.equal(action, sampled) and not metrics


def test_planning_with_a_generator_leaves_the_global_one_alone() -> None:
    learner = agent(config())
    state = torch.get_rng_state()
    actions = [
        learner.act(row(), learner.initial(5), "planner", torch.Generator().manual_seed(3))[0]
        for _ in range(2)
    ]
    assert torch.equal(*actions) and torch.equal(torch.get_rng_state(), state)
