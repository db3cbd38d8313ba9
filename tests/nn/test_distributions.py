from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, Normal, kl_divergence
from torch.distributions import OneHotCategorical as OneHot

from latentplan.nn.action_distributions import ActionDist
from latentplan.nn.distributions import (
    TwoHot,
    bernoulli_log_prob,
    categorical_kl,
    mixed_probs,
    sample_one_hot,
    symexp,
    symexp_bins,
    symlog,
)

BINS = torch.tensor([-4.0, -1.0, 0.0, 1.0, 4.0])
PROBS = torch.tensor([0.1, 0.2, 0.3, 0.25, 0.15])


def two_hot() -> TwoHot:
    return TwoHot(PROBS.log(), BINS)


# --- symlog, two-hot ------------------------------------------------------------------------


def test_symlog_golden_numbers() -> None:
    x = torch.tensor([-math.e + 1, 0.0, 1.0, math.e**3 - 1])
    torch.testing.assert_close(symlog(x), torch.tensor([-1.0, 0.0, math.log(2), 3.0]))
    torch.testing.assert_close(symexp(symlog(x)), x)


def test_bins_are_exactly_symmetric_about_zero() -> None:
    bins = symexp_bins(5)
    torch.testing.assert_close(bins[3:], torch.tensor([math.expm1(10), math.expm1(20)]))
    for count in (5, 41, 255):
        bins = symexp_bins(count)
        assert bins.shape == (count,) and torch.equal(bins, -bins.flip(0))
        assert (bins.diff() > 0).all() and bins[count // 2] == 0


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (2.5, 0.5 * math.log(0.25) + 0.5 * math.log(0.15)),  # half way from 1 to 4
        (0.25, 0.75 * math.log(0.3) + 0.25 * math.log(0.25)),
        (-0.5, 0.5 * math.log(0.2) + 0.5 * math.log(0.3)),
        (1.0, math.log(0.25)),  # on a bin
        (0.0, math.log(0.3)),
        (4.0, math.log(0.15)),  # the outermost bins and targets beyond them
        (1e9, math.log(0.15)),
        (-4.0, math.log(0.1)),
        (-1e9, math.log(0.1)),
    ],
)
def test_two_hot_log_prob_golden_numbers(target: float, expected: float) -> None:
    assert two_hot().log_prob(torch.tensor(target)).item() == pytest.approx(expected, rel=1e-5)


def test_two_hot_mean_golden_number() -> None:
    assert two_hot().mean().item() == pytest.approx(-0.4 - 0.2 + 0.25 + 0.6, rel=1e-5)


def test_two_hot_keeps_leading_axes() -> None:
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([[0.0, 1.0, 2.0], [-3.0, 5.0, 0.1]])
    dist = TwoHot(logits, BINS)
    assert dist.mean().shape == (2, 3)
    one_by_one = [
        [TwoHot(logits[i, j], BINS).log_prob(target[i, j]) for j in range(3)] for i in range(2)
    ]
    torch.testing.assert_close(dist.log_prob(target), torch.tensor(one_by_one))


@pytest.mark.parametrize("level", [0.0, 3.3, -17.0])
@pytest.mark.parametrize("count", [41, 255])
def test_uniform_logits_have_a_mean_of_exactly_zero(level: float, count: int) -> None:
    assert (TwoHot(torch.full((7, count), level), symexp_bins(count)).mean() == 0).all()


@pytest.mark.parametrize("value", [-1234.5, -0.003, 0.0, 0.4, 27.0, 1e6])
def test_the_likeliest_two_hot_has_the_target_as_mean(value: float) -> None:
    """The gradient of the likelihood is the two-hot encoding minus the softmax.

    Softmax probabilities equal to the encoding therefore maximize the likelihood.
    """
    bins = symexp_bins(255)
    logits = torch.zeros(255, requires_grad=True)
    TwoHot(logits, bins).log_prob(torch.tensor(value)).backward()
    encoding = logits.grad + 1 / 255
    assert (encoding > 1e-5).sum() <= 2
    assert encoding.sum().item() == pytest.approx(1, abs=1e-5)
    mean = TwoHot((encoding.clamp(min=0)).log(), bins).mean().item()
    assert mean == pytest.approx(value, rel=1e-3, abs=1e-5)


def test_two_hot_of_bfloat16_logits_computes_in_float32() -> None:
    assert TwoHot(PROBS.log().bfloat16(), BINS).mean().dtype == torch.float32


# --- categorical groups ---------------------------------------------------------------------


def test_mixed_probs_golden_numbers() -> None:
    probs = mixed_probs(torch.tensor([[math.log(3), 0.0]]), 0.1)
    torch.testing.assert_close(probs, torch.tensor([[0.725, 0.275]]))


def test_categorical_kl_golden_number() -> None:
    p = torch.tensor([[0.5, 0.5], [0.2, 0.8]])
    q = torch.tensor([[0.9, 0.1], [0.5, 0.5]])
    # 0.5 ln(5/9) + 0.5 ln 5 = 0.510826;  0.2 ln 0.4 + 0.8 ln 1.6 = 0.192745
    assert categorical_kl(p, p.log(), q.log()).item() == pytest.approx(0.703571, abs=1e-6)


def test_categorical_kl_agrees_with_torch() -> None:
    rng = torch.Generator().manual_seed(0)
    p, q = (torch.randn(5, 3, 4, generator=rng).softmax(-1) for _ in range(2))
    expected = kl_divergence(Independent(OneHot(p), 1), Independent(OneHot(q), 1))
    torch.testing.assert_close(categorical_kl(p, p.log(), q.log()), expected)


def test_straight_through_gradient_is_that_of_the_mixed_probabilities() -> None:
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 3, 4, generator=rng)
    weight = torch.randn(6, 3, 4, generator=rng)
    uniform = torch.rand(6, 3, generator=rng)

    def gradient(function) -> Tensor:
        leaf = logits.clone().requires_grad_()
        (function(leaf) * weight).sum().backward()
        return leaf.grad

    for unimix in (0.0, 0.01, 0.3):
        sampled = gradient(lambda x, mix=unimix: sample_one_hot(x, uniform, mix))
        expected = gradient(lambda x, mix=unimix: mixed_probs(x, mix))
        torch.testing.assert_close(sampled, expected)


def test_samples_are_one_hot_and_repeatable() -> None:
    rng = torch.Generator().manual_seed(0)
    logits, uniform = torch.randn(50, 3, 4, generator=rng), torch.rand(50, 3, generator=rng)
    sample = sample_one_hot(logits, uniform, 0.01)
    assert sample.shape == logits.shape and sample.unique().tolist() == [0, 1]
    assert (sample.sum(-1) == 1).all()
    assert torch.equal(sample, sample_one_hot(logits, uniform, 0.01))


def test_hardness_interpolates_between_probabilities_and_samples() -> None:
    logits = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0))
    uniform = torch.rand(5, 3, generator=torch.Generator().manual_seed(1))
    probs, sample = mixed_probs(logits, 0.01), sample_one_hot(logits, uniform, 0.01)
    torch.testing.assert_close(sample_one_hot(logits, uniform, 0.01, 0.0), probs)
    half = sample_one_hot(logits, uniform, 0.01, 0.5)
    torch.testing.assert_close(half, (probs + sample) / 2)
    assert not torch.allclose(half, sample)
    weights = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(2))
    grads = []
    for hardness in (0.0, 0.5, 1.0):
        leaf = logits.clone().requires_grad_()
        (sample_one_hot(leaf, uniform, 0.01, torch.tensor(hardness)) * weights).sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[0], grads[1])
    torch.testing.assert_close(grads[0], grads[2])


def test_evenly_spread_draws_hit_each_class_by_its_probability() -> None:
    logits = torch.tensor([[1.0, -2.0, 0.5, 0.0]])
    uniform = ((torch.arange(10_000) + 0.5) / 10_000).unsqueeze(-1)
    frequency = sample_one_hot(logits.expand(10_000, 1, 4), uniform, 0.2).mean(0)
    torch.testing.assert_close(frequency, mixed_probs(logits, 0.2), atol=2e-4, rtol=0)


@pytest.mark.parametrize("draw", [0.0, 1 - 2**-24])
def test_draws_at_the_ends_give_a_class(draw: float) -> None:
    logits = torch.randn(2000, 1, 7, generator=torch.Generator().manual_seed(0)) * 5
    sample = sample_one_hot(logits, torch.full((2000, 1), draw), 0.01)
    assert (sample.argmax(-1) == (0 if draw == 0 else 6)).all()
    assert (sample.sum(-1) == 1).all()


# --- actions, flags -------------------------------------------------------------------------


def test_action_dist_is_a_normal() -> None:
    raw = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    dist = ActionDist(raw, 0.1, 1.0)
    reference = Independent(Normal(dist.mean, dist.std), 1)
    action = torch.linspace(-1.5, 1.5, 15).view(5, 3)
    torch.testing.assert_close(dist.log_prob(action), reference.log_prob(action))
    torch.testing.assert_close(dist.entropy(), reference.entropy())
    torch.testing.assert_close(dist.mode, torch.tanh(raw[:, :3]))


def test_action_std_stays_in_its_range() -> None:
    raw = torch.tensor([[0.0, -100.0], [0.0, 100.0], [0.0, -2.0]])
    std = ActionDist(raw, 0.1, 1.0).std.flatten()
    torch.testing.assert_close(std, torch.tensor([0.1, 1.0, 0.55]))


def test_action_samples_follow_noise_and_carry_gradients() -> None:
    raw = torch.zeros(4, requires_grad=True)
    dist = ActionDist(raw, 0.1, 1.0)
    noise = torch.tensor([2.0, -1.0])
    sample = dist.rsample(noise)
    torch.testing.assert_close(sample, dist.mean + dist.std * noise)
    sample.sum().backward()
    assert (raw.grad[:2] == 1).all()  # tanh'(0)
    assert raw.grad[2] > 0 > raw.grad[3]  # a larger deviation moves the sample along its noise


def test_samples_have_the_mean_and_deviation_of_the_distribution() -> None:
    torch.manual_seed(0)
    dist = ActionDist(torch.tensor([0.3, -0.5, 0.0, -2.0]).expand(20_000, 4), 0.1, 1.0)
    sample = dist.rsample()
    torch.testing.assert_close(sample.mean(0), dist.mean[0], atol=0.03, rtol=0)
    torch.testing.assert_close(sample.std(0), dist.std[0], atol=0.02, rtol=0)


def test_bernoulli_golden_numbers() -> None:
    logits = torch.tensor([0.0, math.log(3), math.log(3)])
    log_prob = bernoulli_log_prob(logits, torch.tensor([True, True, False]))
    torch.testing.assert_close(log_prob, torch.tensor([0.5, 0.75, 0.25]).log())
