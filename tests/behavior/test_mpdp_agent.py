"""MPDP in an agent: what moves which weights, what the critic learns, what is distilled."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import VECTOR, agent_config, perturb, random_batch

from latentplan.agent import Agent
from latentplan.behavior import learner
from latentplan.config.loading import load
from latentplan.config.schema import Config, DistillConfig, MpdpConfig, OptimConfig, PlanConfig
from latentplan.types import Latent, UserError


def settings(policies: str = "per_step", candidates: int = 1, **behavior: object) -> Config:
    config = agent_config(improvement="mpdp", gradient="pathwise", **behavior)
    return replace(
        config,
        mpdp=MpdpConfig(policies=policies, horizon=2),
        plan=PlanConfig(candidates=candidates, horizon=2),
        distill=DistillConfig(weight=0.5 if candidates > 1 else 0.0),
    )


def test_only_mpdp_takes_a_fraction_of_the_entropy_bonus() -> None:
    config = settings()
    config = replace(config, mpdp=replace(config.mpdp, entropy_fraction=0.25))
    other = replace(config, behavior=replace(config.behavior, improvement="dreamer"))
    alpha, whole = (Agent(VECTOR, x).temperature.value for x in (config, other))
    torch.testing.assert_close(whole, torch.tensor(config.behavior.entropy_bonus))
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
    perturb(agent.parameters(), 0.3)
    batch, _ = random_batch(3, 4)
    with torch.no_grad():
        latent, _ = agent.world.observe(batch)
    losses, _ = agent.learner.losses(latent, batch)
    (losses["policy"] + losses.get("distill", 0.0)).backward()
    touched = {name.split(".")[0] for name, p in agent.named_parameters() if p.grad is not None}
    assert touched == {"actor"}


def test_the_first_policy_acts() -> None:
    torch.manual_seed(0)
    agent = Agent(VECTOR, settings())
    perturb(agent.parameters(), 0.3)
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
    agent.learner.objective.imagine(agent.world.initial(4))
    assert asked == [0, 0, 0]


def test_entropy_is_paid_in_replay_on_leaving_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = captured(monkeypatch, "replay_returns")
    torch.manual_seed(0)
    agent = Agent(VECTOR, settings(entropy=0.3, replay_scale=1.0))
    perturb(agent.parameters(), 0.3)
    agent.return_scale.range.fill_(7.0)
    batch, _ = random_batch(3, 4)
    with torch.no_grad():
        latent, _ = agent.world.observe(batch)
        entropy = agent.actor(agent.world.features(latent)).entropy()
    agent.learner.losses(latent, batch)
    paid = calls[0][0] - batch.reward
    expected = agent.return_scale.value * 0.3 * entropy[:, :-1]
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


def test_inconsistent_settings_are_refused() -> None:
    for mistake in (
        ["behavior.improvement=mpdp"],
        ["ablation=mpdp_shared", "mpdp.horizon=99"],
        ["ablation=mpdp", "behavior.horizon=3"],
        ["distill.weight=1"],
        ["ablation=mpdp", "plan.candidates=4", "plan.imagine_fraction=0.5"],
        ["ablation=latentplan", "plan.imagine_fraction=1"],
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
        plan=PlanConfig(candidates=3, horizon=2, imagine_fraction=0.0),
        distill=DistillConfig(weight=1.0),
    )
    metrics = Agent(VECTOR, config).update(*random_batch(3, 4))
    assert metrics["train/loss/distill"].isfinite() and metrics["train/plan/distance"].isfinite()
