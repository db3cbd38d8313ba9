"""Distillation of plans for replayed states: the divergence, its weight, and what it teaches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import VECTOR, agent_config, initialize_zero_heads, random_batch, select_rows
from torch.distributions import Normal, kl_divergence

from latentplan.agent import Agent
from latentplan.config.schema import DistillConfig, PlanConfig
from latentplan.nn.action_distributions import ActionDist
from latentplan.types import PlanTarget, Timestep

PLAN = PlanConfig(
    candidates=16, search="cross_entropy", rounds=2, elites=4, horizon=2, imagine_fraction=0.0
)


def teaching_agent(weight: float = 0.5, every: int = 2, states: int = 6) -> Agent:
    torch.manual_seed(0)
    distill = DistillConfig(weight=weight, states=states, every=every)
    agent = Agent(VECTOR, replace(agent_config(), plan=PLAN, distill=distill))
    initialize_zero_heads(agent)
    return agent


def test_the_divergence_is_that_of_normals() -> None:
    torch.manual_seed(0)
    mean, std, target, spread = torch.randn(4, 5, 3).abs().add(0.1).unbind()
    dist = ActionDist.from_mean_std(mean, std)
    expected = kl_divergence(Normal(target, spread), Normal(mean, std)).sum(-1)
    torch.testing.assert_close(dist.divergence(target, spread), expected)


def test_states_are_planned_for_again_every_few_updates() -> None:
    agent = teaching_agent(every=3)
    taught = ["train/loss/distill" in agent.update(*random_batch(4, 4)) for _ in range(6)]
    assert taught == [False, False, True, False, False, True]


def test_without_a_weight_nothing_is_planned_again() -> None:
    agent = teaching_agent(weight=0.0, every=1)
    assert "train/loss/distill" not in agent.update(*random_batch(4, 4))


def test_the_gradient_of_the_plans_is_a_fraction_of_the_policy_gradient() -> None:
    """The actor's gradient with weight w is g + w |g| d, d the direction of the distillation."""

    def gradient(weight: float) -> torch.Tensor:
        agent = teaching_agent(weight, every=1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(agent.optimizer, "step", lambda: None)
            metrics = agent.update(*random_batch(4, 4))
        assert -1 <= float(metrics["train/plan/teach_cosine"]) <= 1
        return torch.cat([p.grad.flatten() for p in agent.actor.parameters()])

    tiny, one, two = gradient(1e-6), gradient(0.5), gradient(1.0)
    torch.testing.assert_close((one - tiny).norm(), 0.5 * tiny.norm(), rtol=1e-3, atol=0)
    torch.testing.assert_close(two - tiny, 2 * (one - tiny), rtol=1e-3, atol=1e-6)


def test_a_step_towards_the_plans_moves_the_mean_to_the_elites() -> None:
    """A critic that likes the first action dimension: plans, and then the policy, raise it."""
    agent = teaching_agent(every=1)
    plan = agent.behavior.plan

    def likes_the_first(*args: object, **options: object) -> object:
        made = plan(*args, **options)
        target = made.refined.target
        mean = torch.full_like(target.mean, 0.8) * torch.tensor([1.0, 0.0])
        target = target._replace(mean=mean, gain=torch.ones_like(target.gain))
        return made._replace(refined=made.refined._replace(target=target))

    batch, episode = random_batch(4, 4)
    latent = agent.world.observe(batch)[0].map(lambda x: x.detach().flatten(0, 1))
    before = agent.behavior.policy(latent).mean.detach()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agent.behavior, "plan", likes_the_first)
        for _ in range(50):
            agent.update(batch, episode)
    moved = (agent.behavior.policy(latent).mean - before).mean(0)
    assert moved[0] > 0.05 and abs(float(moved[1])) < float(moved[0])


def stored_plans(batch: Timestep, gain: torch.Tensor) -> PlanTarget:
    """Random plans (B, T) with the given gains."""
    generator = torch.Generator().manual_seed(5)
    mean, std = (torch.rand(batch.prev_action.shape, generator=generator) for _ in range(2))
    return PlanTarget(mean, std + 0.2, gain)


def test_a_stored_plan_teaches_the_state_that_it_was_made_for() -> None:
    """A plan is stored with the row that its action led to, which is the next one."""
    agent, batch = teaching_agent(states=0), random_batch(3, 5)[0]
    gain = torch.zeros(3, 5)
    gain[0, 2], gain[1, 4], gain[2, 1] = 1.0, 0.5, -1.0  # the last is worse than the policy
    plan = stored_plans(batch, gain)
    torch.manual_seed(1)
    latent = agent.world.observe(batch)[0].map(torch.Tensor.detach)
    losses, _ = agent.learner.losses(latent, batch._replace(prev_plan=plan))
    expected = 0.0
    for b, t in ((0, 2), (1, 4)):
        before = latent.map(lambda x, b=b, t=t: x[b, t - 1 : t])
        dist = agent.behavior.policy(before)
        expected += dist.divergence(plan.mean[b, t], plan.std[b, t]).sum() / (3 * 4)
    torch.testing.assert_close(losses["distill"], expected)


def test_stored_and_new_plans_are_taught_together() -> None:
    batch, episode = random_batch(3, 5)
    planned = batch._replace(prev_plan=stored_plans(batch, torch.ones(3, 5)))
    seen = {}
    for states in (0, 6):
        agent = teaching_agent(every=1, states=states)
        for name, rows in (("stored", planned), ("plain", batch)):
            metrics = agent.update(rows, episode)
            seen[name, states] = "train/loss/distill" in metrics
            assert ("train/plan/stored_gain" in metrics) == (name == "stored")
            assert ("train/plan/teach_gain" in metrics) == bool(states)
    assert seen == {
        ("stored", 0): True,
        ("plain", 0): False,
        ("stored", 6): True,
        ("plain", 6): True,
    }


def test_refined_candidates_never_reach_imagined_rollouts() -> None:
    """What needs samples of the policy never sees the candidates of the search."""
    agent = teaching_agent()
    assert agent.behavior.choose_planned(8) is None


def test_the_first_plans_have_finite_scores_and_give_the_bonus_its_scale() -> None:
    agent = teaching_agent()
    row = select_rows(random_batch(4, 1)[0], 0)
    for _ in range(3):
        _, _, _, metrics = agent.explore(row, agent.initial(4))
        assert int(metrics["train/plan/explore_invalid"]) == 0
        assert float(metrics["train/plan/explore_bonus_spread"]) > 0
    assert agent.bonus_scale.value.isfinite() and int(agent.bonus_scale.count) == 3


def test_a_search_without_a_bonus_measures_no_uncertainty() -> None:
    agent = teaching_agent()
    agent.config = replace(agent.config, plan=replace(agent.config.plan, explore_rate=0.0))
    row = select_rows(random_batch(4, 1)[0], 0)
    latent = agent.world.filter(row, agent.initial(4))
    for optimism in (0.0, 0.1):
        _, target, plan = agent._plan(latent, optimism)
        assert target is not None and (plan.candidates.uncertainty is not None) == bool(optimism)
    agent.explore(row, agent.initial(4))
    assert int(agent.bonus_scale.count) == 0
