"""Distillation of plans for replayed states: the divergence, its weight, and what it teaches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import VECTOR, agent_config, initialize_zero_heads, random_batch, select_rows
from torch.distributions import Normal, kl_divergence

from latentplan.agent import Agent
from latentplan.behavior.losses import plan_divergence
from latentplan.config.schema import DistillConfig, PlanConfig
from latentplan.nn.distributions import ActionDist

PLAN = PlanConfig(
    candidates=16, search="cross_entropy", rounds=2, elites=4, horizon=2, imagine_fraction=0.0
)


def teaching_agent(weight: float = 0.5, every: int = 2) -> Agent:
    torch.manual_seed(0)
    distill = DistillConfig(weight=weight, states=6, every=every)
    agent = Agent(VECTOR, replace(agent_config(), plan=PLAN, distill=distill))
    initialize_zero_heads(agent)
    return agent


def test_the_divergence_is_that_of_normals() -> None:
    torch.manual_seed(0)
    mean, std, target, spread = torch.randn(4, 5, 3).abs().add(0.1).unbind()
    dist = ActionDist.from_mean_std(mean, std)
    expected = kl_divergence(Normal(target, spread), Normal(mean, std)).sum(-1)
    torch.testing.assert_close(plan_divergence(dist, target, spread), expected)


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
        mean = torch.full_like(made.refined.mean, 0.8) * torch.tensor([1.0, 0.0])
        refined = made.refined._replace(mean=mean, gain=torch.ones_like(made.refined.gain))
        return made._replace(refined=refined)

    batch, episode = random_batch(4, 4)
    latent = agent.world.observe(batch)[0].map(lambda x: x.detach().flatten(0, 1))
    before = agent.behavior.policy(latent).mean.detach()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agent.behavior, "plan", likes_the_first)
        for _ in range(50):
            agent.update(batch, episode)
    moved = (agent.behavior.policy(latent).mean - before).mean(0)
    assert moved[0] > 0.05 and abs(float(moved[1])) < float(moved[0])


def test_refined_candidates_never_reach_imagined_rollouts() -> None:
    """What needs samples of the policy never sees the candidates of the search."""
    agent = teaching_agent()
    assert agent.behavior.choose_planned(8) is None


def test_the_first_plans_have_finite_scores_and_give_the_bonus_its_scale() -> None:
    agent = teaching_agent()
    row = select_rows(random_batch(4, 1)[0], 0)
    for _ in range(3):
        _, _, metrics = agent.explore(row, agent.initial(4))
        assert int(metrics["train/plan/explore_invalid"]) == 0
        assert float(metrics["train/plan/explore_bonus_spread"]) > 0
    assert agent.bonus_scale.value.isfinite() and int(agent.bonus_scale.count) == 3
