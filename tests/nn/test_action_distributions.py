"""Categoricals over one-hot actions, against torch.distributions and by enumeration."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from latentplan.nn.action_distributions import ActionDist, CategoricalActions, perturbed

GROUPS = (2, 3)
UNIMIX = 0.1


def random_dist(n: int = 7, unimix: float = UNIMIX) -> tuple[CategoricalActions, list[Categorical]]:
    logits = torch.randn(n, 5, generator=torch.Generator().manual_seed(0))
    references = [
        Categorical(probs=(1 - unimix) * x.softmax(-1) + unimix / x.shape[-1])
        for x in logits.split(GROUPS, -1)
    ]
    return CategoricalActions(logits, GROUPS, unimix), references


def test_probabilities_entropy_and_log_prob_are_those_of_independent_categoricals() -> None:
    dist, references = random_dist()
    torch.testing.assert_close(dist.mean, torch.cat([x.probs for x in references], -1))
    torch.testing.assert_close(dist.entropy(), sum(x.entropy() for x in references))
    action = dist.rsample()
    index = [x.argmax(-1) for x in action.split(GROUPS, -1)]
    expected = sum(x.log_prob(i) for x, i in zip(references, index, strict=True))
    torch.testing.assert_close(dist.log_prob(action), expected)


def test_samples_are_one_hot_and_as_frequent_as_their_probabilities() -> None:
    dist, _ = random_dist(1)
    torch.manual_seed(0)
    sample = dist.map(lambda x: x.expand(40_000, 5)).rsample()
    assert ((sample == 0) | (sample == 1)).all()
    for part in sample.split(GROUPS, -1):
        assert (part.sum(-1) == 1).all()
    torch.testing.assert_close(sample.mean(0), dist.mean[0], atol=0.01, rtol=0)


def test_noise_of_zeros_gives_the_mode_and_the_same_noise_the_same_sample() -> None:
    dist, references = random_dist(50)
    assert torch.equal(dist.rsample(torch.zeros(50, 5)), dist.mode)
    for part, reference in zip(dist.mode.split(GROUPS, -1), references, strict=True):
        assert torch.equal(part.argmax(-1), reference.probs.argmax(-1))
    noise = torch.randn(50, 5)
    assert torch.equal(dist.rsample(noise), dist.rsample(noise))
    extreme = torch.full((50, 5), 40.0)
    assert dist.rsample(extreme).isfinite().all() and dist.rsample(-extreme).isfinite().all()


def test_the_gradient_of_a_sample_is_that_of_the_probabilities() -> None:
    logits = torch.randn(4, 5, requires_grad=True)
    weight, noise = torch.randn(4, 5), torch.randn(4, 5)
    (weight * CategoricalActions(logits, GROUPS, UNIMIX).rsample(noise)).sum().backward()
    by_sample = logits.grad
    logits.grad = None
    (weight * CategoricalActions(logits, GROUPS, UNIMIX).mean).sum().backward()
    assert by_sample is not None and by_sample.abs().sum() > 0
    torch.testing.assert_close(by_sample, logits.grad)


def test_the_divergence_of_a_plan_is_that_of_categoricals() -> None:
    dist, references = random_dist()
    plan = torch.tensor([1.0, 0.0, 0.5, 0.5, 0.0]).expand(7, 5)
    mixed = [(1 - UNIMIX) * x + UNIMIX / x.shape[-1] for x in plan.split(GROUPS, -1)]
    expected = sum(
        kl_divergence(Categorical(probs=p), q) for p, q in zip(mixed, references, strict=True)
    )
    torch.testing.assert_close(dist.divergence(plan, torch.zeros(7, 5)), expected)
    own = CategoricalActions(plan.clamp(min=1e-8).log(), GROUPS, UNIMIX)
    assert own.divergence(plan, torch.zeros(7, 5)).abs().max() < 1e-6
    nothing = torch.zeros(7, 5)  # a row without a plan
    assert dist.divergence(nothing, nothing).isfinite().all()


@pytest.mark.parametrize("candidates", [6, 8])
def test_few_actions_are_all_candidates_and_the_mode_is_the_first(candidates: int) -> None:
    dist, _ = random_dist(20)
    action = dist.first_candidates(torch.zeros(20, candidates, 5), 0.3)
    assert action.shape == (20, candidates, 5) and torch.equal(action[:, 0], dist.mode)
    for row in action:
        assert len({tuple(x.tolist()) for x in row}) == 6
        assert (row[:, :2].sum(-1) == 1).all() and (row[:, 2:].sum(-1) == 1).all()


def test_of_many_actions_samples_are_candidates_with_a_uniform_fraction() -> None:
    logits = torch.tensor([[20.0, 0.0, 20.0, 0.0, 0.0]]).expand(4000, 5)
    dist = CategoricalActions(logits, GROUPS, 1e-6)
    torch.manual_seed(0)
    action = dist.first_candidates(torch.randn(4000, 4, 5), 0.3)
    expected = torch.tensor([0.85, 0.15, 0.8, 0.1, 0.1])
    torch.testing.assert_close(action.mean((0, 1)), expected, atol=0.015, rtol=0)


def test_the_next_round_has_the_frequencies_of_the_elites() -> None:
    dist, _ = random_dist(1, unimix=1e-6)
    elites = torch.tensor([[[1.0, 0, 0, 1, 0], [0, 1, 0, 1, 0], [1, 0, 0, 0, 1], [1, 0, 0, 1, 0]]])
    expected = torch.tensor([[0.75, 0.25, 0.0, 0.75, 0.25]])
    torch.testing.assert_close(dist.fitted(elites).mean, expected, atol=1e-5, rtol=0)


def test_no_gradient_passes_through_a_chosen_action() -> None:
    logits = torch.randn(3, 5, requires_grad=True)
    dist = CategoricalActions(logits, GROUPS, UNIMIX).chosen(torch.tensor([1]))
    (torch.randn(3, 5) * dist.rsample()).sum().backward()
    assert logits.grad is not None
    assert (logits.grad[1] == 0).all() and (logits.grad[[0, 2]] != 0).all()


def test_width_is_the_fraction_of_the_largest_entropy() -> None:
    uniform = CategoricalActions(torch.zeros(3, 5), GROUPS, 0.01)
    sure = CategoricalActions(torch.tensor([[50.0, 0, 0, 50, 0]]), GROUPS, 1e-6)
    assert float(uniform.width(0.1, 1.0)) == pytest.approx(1)
    assert float(sure.width(0.1, 1.0)) == pytest.approx(0, abs=1e-4)
    normal = ActionDist.from_mean_std(torch.zeros(2, 3), torch.full((2, 3), 0.55))
    assert float(normal.width(0.1, 1.0)) == pytest.approx(0.5)


def test_exploration_replaces_each_choice_with_the_given_probability() -> None:
    action = torch.tensor([1.0, 0, 1, 0, 0]).expand(20_000, 5)
    torch.manual_seed(0)
    explored = perturbed(action, 0.4, GROUPS)
    expected = torch.tensor([0.8, 0.2, 0.6 + 0.4 / 3, 0.4 / 3, 0.4 / 3])
    torch.testing.assert_close(explored.mean(0), expected, atol=0.015, rtol=0)
    assert (explored[:, :2].sum(-1) == 1).all() and (explored[:, 2:].sum(-1) == 1).all()
    assert torch.equal(perturbed(action, 0.0, GROUPS), action)
