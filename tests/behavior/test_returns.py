from __future__ import annotations

import pytest
import torch
from torch import Tensor

from latentplan.behavior.losses import make_target, replay_returns
from latentplan.behavior.returns import BonusScale, ReturnScale, UncertaintyScale, lambda_returns
from latentplan.config.schema import BehaviorConfig
from latentplan.types import Choice, Latent, Rollout

REWARD = torch.tensor([[1.0, 2.0, 3.0]])
VALUE = torch.tensor([[10.0, 20.0, 30.0]])
DISCOUNT = torch.tensor([[0.9, 0.8, 0.5]])


def assert_row(actual: Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(actual, torch.tensor([expected]))


# --- lambda-returns -------------------------------------------------------------------------


def test_golden_numbers() -> None:
    # R3 = 3 + 0.5 * 30;  R2 = 2 + 0.8 (0.5 * 20 + 0.5 R3);  R1 = 1 + 0.9 (0.5 * 10 + 0.5 R2)
    assert_row(lambda_returns(REWARD, VALUE, DISCOUNT, 0.5), [13.24, 17.2, 18.0])


def test_lambda_zero_is_one_step() -> None:
    assert_row(lambda_returns(REWARD, VALUE, DISCOUNT, 0.0), [10.0, 18.0, 18.0])


def test_lambda_one_is_monte_carlo() -> None:
    # R2 = 2 + 0.8 * 18;  R1 = 1 + 0.9 R2: the values in between do not matter
    expected = [15.76, 16.4, 18.0]
    assert_row(lambda_returns(REWARD, VALUE, DISCOUNT, 1.0), expected)
    other = torch.tensor([[-99.0, 99.0, 30.0]])
    assert_row(lambda_returns(REWARD, other, DISCOUNT, 1.0), expected)


def test_a_cut_bootstraps_and_hides_what_comes_after() -> None:
    last = torch.tensor([[False, True, False]])
    # R2 = 2 + 0.8 * 20;  R1 = 1 + 0.9 (0.5 * 10 + 0.5 R2)
    assert_row(lambda_returns(REWARD, VALUE, DISCOUNT, 0.5, last), [13.6, 18.0, 18.0])
    other = torch.tensor([[1.0, 2.0, -99.0]])
    assert_row(lambda_returns(other, VALUE, DISCOUNT, 0.5, last)[:, :2], [13.6, 18.0])


def test_nothing_is_earned_after_the_end() -> None:
    discount = torch.tensor([[0.9, 0.0, 0.5]])
    # R2 = 2;  R1 = 1 + 0.9 (0.5 * 10 + 0.5 * 2)
    assert_row(lambda_returns(REWARD, VALUE, discount, 0.5), [6.4, 2.0, 18.0])


@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
def test_it_equals_a_slow_reference(lam: float) -> None:
    rng = torch.Generator().manual_seed(0)
    reward, value, discount = (torch.rand(4, 9, generator=rng) for _ in range(3))
    last = torch.rand(4, 9, generator=rng) < 0.3

    def slow(n: int, h: int) -> float:
        after = value[n, h]
        if h + 1 < 9 and not last[n, h]:
            after = (1 - lam) * value[n, h] + lam * slow(n, h + 1)
        return reward[n, h] + discount[n, h] * after

    expected = torch.tensor([[slow(n, h) for h in range(9)] for n in range(4)])
    torch.testing.assert_close(lambda_returns(reward, value, discount, lam, last), expected)


def test_gradients_reach_rewards_values_and_discounts() -> None:
    inputs = [x.clone().requires_grad_() for x in (REWARD, VALUE, DISCOUNT)]
    lambda_returns(*inputs, 0.5)[0, 0].backward()
    # dR1/dr3 = 0.9 * 0.5 * 0.8 * 0.5;  dR1/dv1 = 0.9 * 0.5;  dR1/dd1 = 0.5 * 10 + 0.5 R2
    assert_row(inputs[0].grad, [1.0, 0.45, 0.18])
    assert inputs[1].grad[0, 0].item() == pytest.approx(0.45)
    assert inputs[2].grad[0, 0].item() == pytest.approx(13.6)


# --- the scale ------------------------------------------------------------------------------


def test_the_scale_does_not_enlarge_small_returns() -> None:
    scale = ReturnScale(0.01)
    assert scale.value == 1
    scale.update(torch.linspace(0, 0.1, 100))
    assert scale.value == 1


def test_the_scale_is_the_range_from_the_first_update_on() -> None:
    scale = ReturnScale(0.01)
    returns = torch.linspace(0, 100, 101)  # 5th percentile 5, 95th 95
    for _ in range(3):
        scale.update(returns)
        assert scale.value.item() == pytest.approx(90, rel=1e-4)


def test_the_scale_follows_by_its_rate() -> None:
    scale = ReturnScale(0.1)
    returns = torch.linspace(0, 100, 101)
    scale.update(returns)
    scale.update(2 * returns)
    # (0.9 * 0.1 * 90 + 0.1 * 180) / (1 - 0.9^2)
    assert scale.value.item() == pytest.approx(26.1 / 0.19, rel=1e-4)


def test_the_scale_ignores_outliers() -> None:
    scale = ReturnScale(0.01)
    returns = torch.linspace(0, 100, 1001)
    returns[-1] = 1e6
    scale.update(returns)
    assert scale.value.item() == pytest.approx(90, rel=1e-3)


# --- targets --------------------------------------------------------------------------------


def rollout(reward: Tensor, cont: Tensor) -> Rollout:
    n, h = reward.shape
    latent = Latent(torch.zeros(n, h + 1, 2), torch.zeros(n, h + 1, 1, 2))
    choice = Choice(torch.zeros(n, h, 1), torch.zeros(n, h, 1))
    return Rollout(latent, choice, reward, cont, torch.zeros(n, h))


def test_a_target_weighs_states_by_the_chance_of_reaching_them() -> None:
    reward, value = REWARD.expand(2, 3), VALUE.expand(2, 3)
    cont = torch.tensor([[0.5, 1.0, 0.25], [1.0, 1.0, 1.0]])
    alive = torch.tensor([1.0, 0.0])
    target = make_target(rollout(reward, cont), value, alive, 0.8, 0.5)
    # the state left at h: the start, then what 0.8 * cont leaves of it; a dead start counts nothing
    expected = torch.tensor([[1.0, 0.4, 0.32], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(target.weight, expected)
    expected = lambda_returns(reward, value, 0.8 * cont, 0.5)
    torch.testing.assert_close(target.returns, expected)


def test_weights_carry_no_gradient() -> None:
    cont = torch.full((1, 3), 0.5, requires_grad=True)
    target = make_target(rollout(REWARD, cont), VALUE, torch.ones(1), 0.9, 0.95)
    assert not target.weight.requires_grad and target.returns.requires_grad


def replayed(is_first: list[int], is_terminal: list[int]) -> tuple[Tensor, Tensor]:
    config = BehaviorConfig(discount_horizon=5.0, lam=0.5)  # discount 0.8
    reward = torch.tensor([[7.0, 1.0, 2.0, 0.0, 3.0]])
    value = torch.tensor([[50.0, 10.0, 20.0, 30.0, 40.0]])
    flags = [torch.tensor([flag]).bool() for flag in (is_first, is_terminal)]
    return replay_returns(reward, value, *flags, config)


def test_replayed_returns_without_an_end() -> None:
    returns, weight = replayed([1, 0, 0, 0, 0], [0, 0, 0, 0, 0])
    # from behind: 3 + 0.8 * 40;  0 + 0.8 (15 + 17.5);  2 + 0.8 (10 + 13);  1 + 0.8 (5 + 10.2)
    assert_row(returns, [13.16, 20.4, 26.0, 35.0])
    assert_row(weight, [1.0, 1.0, 1.0, 1.0])


def test_replayed_returns_bootstrap_where_an_episode_was_cut() -> None:
    returns, weight = replayed([1, 0, 0, 1, 0], [0, 0, 0, 0, 0])
    # row 2 is the last of its episode: 2 + 0.8 * 20;  before it 1 + 0.8 (5 + 9)
    assert returns[0, :2].tolist() == pytest.approx([12.2, 18.0])
    assert returns[0, 3].item() == pytest.approx(35.0)
    assert_row(weight, [1.0, 1.0, 0.0, 1.0])  # row 2 leads to a reset: nothing to learn there


def test_replayed_returns_end_where_the_episode_did() -> None:
    returns, weight = replayed([1, 0, 0, 1, 0], [0, 0, 1, 0, 0])
    assert returns[0, :2].tolist() == pytest.approx([5.8, 2.0])  # 1 + 0.8 (5 + 1)
    assert_row(weight, [1.0, 1.0, 0.0, 1.0])


def test_the_uncertainty_scale_never_decreases() -> None:
    scale = UncertaintyScale(0.1, warmup=2)
    assert scale.value == 1
    seen = []
    for high in (50.0, 2.0, 4.0, 4.0, 1.0, 0.1, 0.1):
        scale.update(torch.tensor(high))
        seen.append(float(scale.value))
    # Untrained members say nothing that should last.
    assert seen[:2] == [50, 2] and seen[2] == pytest.approx(2.2)
    assert seen[1:] == sorted(seen[1:]) and seen[-1] == seen[3] < 4.0


def test_with_the_bonus_scale_uncertainty_has_the_spread_of_the_return() -> None:
    scale = BonusScale(0.5)
    assert float(scale.value) == 1.0
    for _ in range(20):
        scale.update(torch.tensor([0.2, 3.0]))
    assert float(3.0 / scale.value) == pytest.approx(0.2)


def test_before_the_first_reward_the_bonus_is_larger_than_the_return() -> None:
    """The return differs by 1e-5 of its scale: a tenth of the floor outweighs that."""
    scale = BonusScale(0.5)
    scale.update(torch.tensor([1e-5, 3.0]))
    assert float(0.1 * 3.0 / scale.value) == pytest.approx(0.1 * BonusScale.FLOOR)


def test_spreads_that_are_not_finite_change_no_bonus_scale() -> None:
    scale = BonusScale(0.5)
    scale.update(torch.tensor([0.2, 3.0]))
    before = scale.value
    scale.update(torch.tensor([0.2, torch.inf]))
    assert torch.equal(scale.value, before)


def test_the_remaining_uncertainty_falls_with_the_recent_one() -> None:
    scale = UncertaintyScale(0.5, warmup=1)
    assert float(scale.remaining) == 1.0
    scale.update(torch.tensor(0.8))
    assert float(scale.remaining) == pytest.approx(1.0)
    for _ in range(30):
        scale.update(torch.tensor(0.2))
    assert float(scale.remaining) == pytest.approx(0.25, abs=1e-3)
