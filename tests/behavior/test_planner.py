"""The planner on toys whose best action is known."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny import VECTOR, world_config
from torch import Tensor

from latentplan.behavior.planner import Plan, plan, plan_metrics, refine
from latentplan.nn.action_distributions import ActionDist
from latentplan.types import Latent, Prediction, StepNoise
from latentplan.world.model import WorldModel

ZERO = torch.zeros(())


def latent(x: Tensor) -> Latent:
    """A toy's state (N, D) as a latent."""
    return Latent(x, torch.zeros(x.shape[0], 1, 1))


def policy(state: Latent) -> ActionDist:
    """Centered, wide, one action dimension, the same everywhere."""
    return ActionDist(torch.zeros(state.deter.shape[0], 2), 0.1, 1.0)


def toy(
    reward: Callable[[Tensor, Tensor], Tensor] = lambda x, a: ZERO.expand(len(x)),
    uncertainty: Callable[[Tensor, Tensor], Tensor] = lambda x, a: ZERO.expand(len(x)),
    cont: Callable[[Tensor, Tensor], Tensor] = lambda x, a: torch.ones(len(x)),
) -> Callable[[Latent, Tensor, StepNoise | None], Prediction]:
    """x' = x + a; the terms see (x', a)."""

    def step(state: Latent, action: Tensor, noise: StepNoise | None = None) -> Prediction:
        arrived = state.deter + action
        terms = (f(arrived, action) for f in (reward, cont, uncertainty))
        return Prediction(latent(arrived), *terms)

    return step


def gaussians(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def closeness(x: Tensor, a: Tensor) -> Tensor:
    return -x[:, 0].square()


def test_a_point_mass_goes_where_it_should() -> None:
    start = torch.tensor([[-0.8], [0.0], [0.5], [0.9]])
    result = plan(toy(closeness), policy, latent(start), candidates=2000, horizon=1, optimism=0.0)
    torch.testing.assert_close(result.action, -start, atol=0.02, rtol=0)


def test_later_steps_count() -> None:
    """Only the second arrival pays, and most where both actions together make 1."""

    def step(state: Latent, action: Tensor, noise: StepNoise | None = None) -> Prediction:
        place, steps = state.deter[:, 0] + action[:, 0], state.deter[:, 1] + 1
        paid = torch.where(steps == 2, -(place - 1).square(), -torch.ones(()))
        nothing = torch.zeros_like(place)
        return Prediction(latent(torch.stack([place, steps], 1)), paid, nothing + 1, nothing)

    start = latent(torch.zeros(1, 2))
    result = plan(step, policy, start, candidates=4000, horizon=2, optimism=0.0)
    actions = result.candidates.choice.action[0, result.best[0], :, 0]
    assert abs(float(actions.sum()) - 1) < 0.02


@pytest.mark.parametrize("optimism", [1.0, -1.0])
def test_the_sign_of_optimism_is_the_direction_of_the_choice(optimism: float) -> None:
    """Two arms that pay the same; of the right one the model knows nothing."""
    arms = toy(uncertainty=lambda x, a: (a[:, 0] > 0).float())
    start = latent(torch.zeros(50, 1))
    result = plan(arms, policy, start, candidates=32, horizon=1, optimism=optimism)
    assert (torch.sign(result.action) == optimism).all()


def test_one_candidate_is_the_policy() -> None:
    noise = gaussians(7, 1, 3, 1)
    start = latent(gaussians(7, 1, seed=1))
    result = plan(toy(closeness), policy, start, candidates=1, horizon=3, optimism=5.0, noise=noise)
    torch.testing.assert_close(result.action, policy(start).rsample(noise[:, 0, 0]))
    assert torch.equal(result.noise, noise[:, 0]) and not result.best.any()


def test_without_optimism_and_value_it_is_the_best_of_k_by_reward() -> None:
    noise = gaussians(5, 6, 2, 1)
    start = gaussians(5, 1, seed=1)
    step = toy(closeness, uncertainty=lambda x, a: 100 * a[:, 0].abs())
    result = plan(step, policy, latent(start), candidates=6, horizon=2, optimism=0.0, noise=noise)
    actions = policy(latent(torch.zeros(30, 1))).rsample(noise[:, :, 0].reshape(30, 1)).view(5, 6)
    second = policy(latent(torch.zeros(30, 1))).rsample(noise[:, :, 1].reshape(30, 1)).view(5, 6)
    returns = -(start + actions).square() - (start + actions + second).square()
    torch.testing.assert_close(result.ret, returns)
    assert torch.equal(result.best, returns.argmax(1))


def test_the_score_is_the_sum_of_its_terms() -> None:
    """By hand: rewards 1, 2, 3, uncertainties 4, 5, 6, going on with 0.5 after the first."""
    table = torch.tensor([[1.0, 4.0, 1.0], [2.0, 5.0, 0.5], [3.0, 6.0, 1.0]])

    def step(state: Latent, action: Tensor, noise: StepNoise | None = None) -> Prediction:
        row = table[state.deter[:, 0].long()]
        return Prediction(latent(state.deter + 1), row[:, 0], row[:, 2], row[:, 1])

    result = plan(
        step,
        policy,
        latent(torch.zeros(2, 1)),
        candidates=3,
        horizon=3,
        optimism=-0.5,
        discount=0.9,
        value=lambda state: state.deter[..., 0] * 10,
        reward_scale=2.0,
        uncertainty_scale=4.0,
    )
    weights = torch.tensor([1.0, 0.9, 0.9 * 0.9 * 0.5])
    end = 0.9**3 * 0.5
    ret = ((weights * table[:, 0]).sum() + end * 30) / 2
    novelty = (weights * table[:, 1]).sum() / 4
    torch.testing.assert_close(result.ret, ret.expand(2, 3))
    torch.testing.assert_close(result.novelty, novelty.expand(2, 3))
    torch.testing.assert_close(result.score, (ret - 0.5 * novelty).expand(2, 3))


def test_an_end_cuts_the_plan() -> None:
    """Nothing after a certain end counts, neither reward nor uncertainty nor value."""
    step = toy(
        reward=lambda x, a: torch.ones(len(x)),
        uncertainty=lambda x, a: torch.ones(len(x)),
        cont=lambda x, a: torch.zeros(len(x)),
    )
    value = lambda state: torch.full(state.deter.shape[:-1], 1e6)  # noqa: E731
    start = latent(torch.zeros(3, 1))
    result = plan(step, policy, start, candidates=2, horizon=5, optimism=1.0, value=value)
    assert (result.ret == 1).all() and (result.novelty == 1).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("term", ["reward", "uncertainty"])
def test_a_score_that_is_not_finite_never_wins(term: str, bad: float) -> None:
    spoiled = lambda x, a: torch.where(a[:, 0] > -0.5, bad, a[:, 0])  # noqa: E731
    start = latent(torch.zeros(40, 1))
    result = plan(toy(**{term: spoiled}), policy, start, candidates=64, horizon=1, optimism=1.0)
    assert (result.action <= -0.5).all()
    assert (result.score == -torch.inf).sum() > 40 * 32
    assert result.score.gather(1, result.best[:, None]).isfinite().all()


def test_without_optimism_a_broken_uncertainty_spoils_nothing() -> None:
    step = toy(closeness, uncertainty=lambda x, a: torch.full((len(x),), torch.nan))
    result = plan(step, policy, latent(torch.zeros(2, 1)), candidates=9, horizon=1, optimism=0.0)
    assert result.score.isfinite().all()


def test_states_are_planned_independently() -> None:
    noise, start = gaussians(6, 5, 3, 1), gaussians(6, 1, seed=2)
    step = toy(closeness, uncertainty=lambda x, a: x[:, 0].abs())
    options = dict(candidates=5, horizon=3, optimism=0.3, discount=0.97)
    together = plan(step, policy, latent(start), noise=noise, **options)
    for i in range(6):
        alone = plan(step, policy, latent(start[i : i + 1]), noise=noise[i : i + 1], **options)
        torch.testing.assert_close(alone.score[0], together.score[i])
        torch.testing.assert_close(alone.action[0], together.action[i])


def test_the_order_of_candidates_means_nothing() -> None:
    noise, start = gaussians(4, 8, 3, 1), latent(gaussians(4, 1, seed=2))
    order = torch.tensor([3, 0, 7, 1, 6, 2, 5, 4])
    options = dict(candidates=8, horizon=3, optimism=-0.3)
    step = toy(closeness, uncertainty=lambda x, a: a[:, 0].abs())
    one = plan(step, policy, start, noise=noise, **options)
    other = plan(step, policy, start, noise=noise[:, order], **options)
    torch.testing.assert_close(one.score[:, order], other.score)
    torch.testing.assert_close(one.action, other.action)
    torch.testing.assert_close(one.noise, other.noise)


def test_the_plan_carries_no_gradient() -> None:
    weight = torch.ones(1, requires_grad=True)
    step = toy(lambda x, a: weight * closeness(x, a))
    result = plan(step, policy, latent(torch.zeros(2, 1)), candidates=3, horizon=2, optimism=0.1)
    tensors = [*result[:7], *result.candidates.latent, result.candidates.reward]
    assert not any(x.requires_grad for x in tensors)


# --- with the RSSM --------------------------------------------------------------------------


@pytest.mark.parametrize("n", [6, 5], ids=["members in blocks", "members drawn"])
@pytest.mark.parametrize("measure", ["jsd", "std", "probes"])
def test_candidates_share_the_dynamics_randomness(n: int, measure: str) -> None:
    """A policy without randomness: with common random numbers all candidates are the same."""
    torch.manual_seed(0)
    world = WorldModel(VECTOR, world_config(uncertainty=measure))
    certain = lambda state: ActionDist(torch.zeros(len(state.deter), 4), 0.0, 0.0)  # noqa: E731
    start = Latent(torch.randn(n, 16).tanh(), torch.rand(n, 3, 4))
    options = dict(candidates=4, horizon=3, optimism=1.0)
    noise = world.draw_noise(n, 3)
    assert (noise.member is None) == (n == 6)
    shared = plan(world.step, certain, start, step_noise=noise, **options)
    for x in (*shared.candidates.latent, shared.score):
        torch.testing.assert_close(x, x[:, :1].expand_as(x))
    own = plan(world.step, certain, start, **options)
    assert not torch.equal(*(own.candidates.latent.stoch[:, k] for k in (0, 1)))


def considered(ret: list[float], novelty: list[float], optimism: float, value: float = 0) -> Plan:
    ret, novelty = torch.tensor([ret]), torch.tensor([novelty])
    score = ret + optimism * novelty
    score = score.masked_fill(~score.isfinite(), -torch.inf)
    final_values = torch.tensor([[0.0, value]])
    return Plan(ZERO, ZERO, score.argmax(1), score, ret, final_values, novelty, None)


def test_the_bonus_share_compares_spreads() -> None:
    def share(ret: list[float], novelty: list[float], optimism: float) -> float:
        result = considered(ret, novelty, optimism)
        return float(plan_metrics("x", [result], optimism)["train/plan/x_bonus_share"])

    assert share([1.0, 2.0], [5.0, 5.0], 1.0) == 0
    assert share([2.0, 2.0], [1.0, 5.0], 1.0) == 1
    assert share([1.0, 2.0], [3.0, 2.0], -3.0) == pytest.approx(0.75)
    assert share([1.0, 2.0], [3.0, torch.nan], 0.0) == 0


def test_plans_are_summed_up_over_states_with_finite_scores() -> None:
    good = considered([1.0, 3.0], [1.0, 0.0], 1.0, value=6.0)
    bad = considered([1.0, torch.nan], [2.0, 0.0], 1.0)
    metrics = plan_metrics("x", [good, bad], 1.0)
    expected = {
        "reward_spread": 2.0,  # of 1 and 3 - 6
        "value_spread": 3.0,
        "bonus_spread": 0.5,
        "bonus_share": pytest.approx(1 / 3),
        "gain": 1.0,  # 3 instead of 2
        "invalid": 1.0,
    }
    assert {k.removeprefix("train/plan/x_"): float(x) for k, x in metrics.items()} == expected
    assert all(x.isfinite() for x in plan_metrics("x", [bad], 1.0).values())


def test_optimism_needs_a_measured_uncertainty() -> None:
    def blind(state: Latent, action: Tensor, noise: StepNoise | None = None) -> Prediction:
        return toy(closeness)(state, action)._replace(uncertainty=None)

    start = latent(torch.zeros(2, 1))
    assert not plan(blind, policy, start, candidates=2, horizon=2, optimism=0.0).novelty.any()
    with pytest.raises(ValueError, match="uncertainty"):
        plan(blind, policy, start, candidates=2, horizon=2, optimism=0.1)


def test_a_given_policy_at_the_start_is_not_evaluated_again() -> None:
    asked = []
    counting = lambda state: asked.append(len(state.deter)) or policy(state)  # noqa: E731
    start, noise = latent(gaussians(3, 1)), gaussians(3, 4, 2, 1)
    options = dict(candidates=4, horizon=2, optimism=0.0, noise=noise)
    one = plan(toy(closeness), counting, start, **options)
    assert asked == [3, 12]
    other = plan(toy(closeness), counting, start, first=policy(start), **options)
    assert asked == [3, 12, 12] and torch.equal(one.score, other.score)


# --- the cross-entropy search ---------------------------------------------------------------


def narrow(state: Latent) -> ActionDist:
    """A policy that is sure of a wrong action, 0.5."""
    mean = torch.full((state.deter.shape[0], 1), 0.5)
    return ActionDist.from_mean_std(mean, torch.full_like(mean, 0.1))


SEARCH = {"candidates": 24, "rounds": 3, "elites": 6, "width": 0.3, "horizon": 1, "optimism": 0.0}


def test_the_search_finds_an_action_far_from_the_policy() -> None:
    start = torch.tensor([[-0.8], [0.0], [0.5], [0.9]])
    result = refine(toy(closeness), narrow, latent(start), **SEARCH | {"width": 1.0})
    torch.testing.assert_close(result.action, -start, atol=0.1, rtol=0)
    assert result.refined is not None
    torch.testing.assert_close(result.refined.target.mean, -start, atol=0.1, rtol=0)
    assert (result.refined.target.std < 0.5).all()


def test_the_search_never_chooses_what_scores_below_the_policy_mean() -> None:
    start = latent(gaussians(50, 1))
    noise = 3 * gaussians(1, 50, 4, 1, seed=1)
    result = refine(
        toy(closeness),
        narrow,
        start,
        **SEARCH | {"candidates": 4, "rounds": 1, "elites": 1},
        noise=noise,
    )
    own = closeness(start.deter + 0.5, start.deter)
    assert result.refined is not None and (result.refined.target.gain >= 0).all()
    torch.testing.assert_close(result.score.amax(1) - result.refined.target.gain, own)


def test_what_a_plan_teaches_is_chosen_without_the_bonus() -> None:
    """The bonus chooses large actions, and the return actions near zero."""
    start = latent(torch.zeros(4, 1))
    curious = toy(closeness, uncertainty=lambda state, action: action[:, 0] * 100)
    noise = gaussians(3, 4, 24, 1)
    wide = SEARCH | {"width": 1.0, "noise": noise}
    result = refine(curious, narrow, start, **wide | {"optimism": 1.0})
    sober = refine(curious, narrow, start, **wide)
    assert result.refined is not None and sober.refined is not None
    drawn = result.candidates.choice.action[:, :, 0]
    assert (result.action == drawn.amax(1)).all() and (result.action > 0.6).all()
    by_return = drawn.take_along_dim(result.ret.topk(6, 1).indices[..., None], 1)
    torch.testing.assert_close(result.refined.target.mean, by_return.mean(1))
    expected = result.ret.amax(1) - closeness(start.deter + 0.5, start.deter)
    torch.testing.assert_close(result.refined.target.gain, expected)
    assert (sober.refined.target.mean.abs() < 0.1).all()


def test_candidates_follow_the_mean_of_the_policy_after_their_first_action() -> None:
    start = latent(torch.zeros(2, 1))
    result = refine(toy(closeness), narrow, start, **SEARCH | {"horizon": 3})
    actions = result.candidates.choice.action
    assert (actions[:, :, 1:] == 0.5).all() and actions[:, :, 0].std() > 0


def test_every_second_candidate_holds_its_first_action() -> None:
    start, noise = latent(torch.tensor([[2.0], [-1.0]])), gaussians(3, 2, 24, 1)
    settings = SEARCH | {"horizon": 4, "noise": noise}
    actions = refine(toy(closeness), narrow, start, **settings | {"hold": 3}).candidates.choice[0]
    assert (actions[:, 1::2, 1:3] == actions[:, 1::2, :1]).all() and actions[:, :, 0].std() > 0
    assert (actions[:, ::2, 1:] == 0.5).all() and (actions[:, :, 3] == 0.5).all()
    held_once, plain = (
        refine(toy(closeness), narrow, start, **settings | more) for more in ({"hold": 1}, {})
    )
    assert torch.equal(held_once.action, plain.action)
    alone = settings | {"hold": 3, "candidates": 1, "elites": 1, "noise": noise[:, :, :1]}
    assert (refine(toy(closeness), narrow, start, **alone).action == 0.5).all()


def test_held_actions_reach_a_reward_that_no_single_action_reaches() -> None:
    far = toy(lambda x, a: (x[:, 0] > 2.5).float())  # the policy's four actions lead to 2.0
    start, settings = latent(torch.zeros(1, 1)), SEARCH | {"noise": gaussians(3, 1, 24, 1)}
    settings |= {"width": 1.0, "horizon": 4}
    assert refine(far, narrow, start, **settings).ret.max() == 0
    held = refine(far, narrow, start, **settings | {"hold": 4})
    assert held.ret.max() > 0 and held.action > 0.6


@pytest.mark.parametrize("optimism", [1.0, -1.0])
def test_the_sign_of_optimism_is_the_direction_of_the_search(optimism: float) -> None:
    arms = toy(uncertainty=lambda x, a: (a[:, 0] > 0.5).float())
    start = latent(torch.zeros(50, 1))
    result = refine(arms, narrow, start, **SEARCH | {"optimism": optimism})
    assert ((result.action > 0.5) == (optimism > 0)).all()


def test_with_random_dynamics_the_search_earns_more_than_the_mean_of_the_policy() -> None:
    """The search sees expected states; the gain is measured in random ones that it never saw."""
    start = gaussians(400, 1, seed=3)

    def expected(state: Latent, action: Tensor, noise: StepNoise | None = None) -> Prediction:
        arrived = state.deter + action
        return Prediction(
            latent(arrived), closeness(arrived, action), torch.ones(len(arrived)), None
        )

    def earned(first: Tensor) -> Tensor:
        x, total = start + first + 0.5 * gaussians(400, 1, seed=4), torch.zeros(400)
        for h in range(2):
            total = total + closeness(x, x)
            x = x + 0.5 + 0.5 * gaussians(400, 1, seed=5 + h)
        return total

    result = refine(expected, narrow, latent(start), **SEARCH | {"horizon": 2})
    gain = earned(result.action) - earned(torch.full((400, 1), 0.5))
    assert float(gain.mean()) > 4 * float(gain.std()) / 20
