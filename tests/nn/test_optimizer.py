from __future__ import annotations

import math
from copy import deepcopy

import pytest
import torch
from torch import nn

from latentplan.nn.optimizer import LaProp

GRADS = [0.5, -1.0, 0.25, 2.0, 0.0, -0.125]


def reference(weight: float, *, lr: float, clip: float, warmup: int) -> list[float]:
    """The weights after each step of LaProp with adaptive clipping, computed on one number."""
    beta1, beta2, mean, square, path = 0.9, 0.999, 0.0, 0.0, []
    for step, grad in enumerate(GRADS, 1):
        limit = clip * max(abs(weight), 1e-3)
        grad = math.copysign(min(abs(grad), limit), grad)
        square = beta2 * square + (1 - beta2) * grad**2
        normed = grad / math.sqrt(square / (1 - beta2**step))
        mean = beta1 * mean + (1 - beta1) * normed
        weight -= lr * min(1.0, step / max(1, warmup)) * mean / (1 - beta1**step)
        path.append(weight)
    return path


def run(optimizer: LaProp, parameter: nn.Parameter, grads: list[float]) -> list[float]:
    path = []
    for grad in grads:
        parameter.grad = torch.full_like(parameter, grad)
        optimizer.step()
        path.append(parameter.detach().flatten()[0].item())
    return path


@pytest.mark.parametrize("warmup", [0, 4])
@pytest.mark.parametrize("clip", [0.3, 1e6])
def test_steps_agree_with_the_reference(clip: float, warmup: int) -> None:
    parameter = nn.Parameter(torch.tensor(0.8))
    optimizer = LaProp([parameter], lr=0.1, clip=clip, warmup=warmup)
    expected = reference(0.8, lr=0.1, clip=clip, warmup=warmup)
    assert run(optimizer, parameter, GRADS) == pytest.approx(expected, rel=1e-4)


def test_the_first_step_is_the_rate_for_any_gradient() -> None:
    for grad in (1e-6, 1.0, 1e6):
        parameter = nn.Parameter(torch.tensor(1.0))
        run(LaProp([parameter], lr=0.1, clip=0.3, warmup=0), parameter, [grad])
        assert parameter.item() == pytest.approx(0.9)


def test_warm_up_rises_linearly() -> None:
    steps = []
    for warmup in (1, 4):
        parameter = nn.Parameter(torch.tensor(100.0))
        path = run(LaProp([parameter], lr=0.1, clip=0.3, warmup=warmup), parameter, [1.0] * 6)
        steps.append([a - b for a, b in zip([100.0, *path[:-1]], path, strict=True)])
    assert [b / a for a, b in zip(*steps, strict=True)] == pytest.approx(
        [0.25, 0.5, 0.75, 1, 1, 1], rel=1e-3
    )


def test_clipping_is_per_tensor_and_relative_to_its_weights() -> None:
    """The norm of a gradient is at most ``clip`` times that of the weights.

    Its direction does not change.
    """
    large, small = nn.Parameter(torch.tensor([3.0, 4.0])), nn.Parameter(torch.tensor([0.3, 0.4]))
    optimizer = LaProp([large, small], lr=0.0, clip=0.3, warmup=0)
    large.grad, small.grad = torch.tensor([0.6, 0.8]), torch.tensor([0.6, 0.8])
    optimizer.step()
    square = lambda p: optimizer.state[p]["square"] / (1 - 0.999)  # noqa: E731
    torch.testing.assert_close(square(large), large.grad.square())  # 1 < 0.3 * 5: not clipped
    torch.testing.assert_close(square(small), (0.15 * small.grad).square())  # 0.3 * 0.5
    assert large.grad.tolist() == pytest.approx([0.6, 0.8])  # the gradient itself is not changed


def test_weights_at_zero_can_leave_it() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    run(LaProp([parameter], lr=0.1, clip=0.3, warmup=0), parameter, [1.0])
    assert parameter.tolist() == pytest.approx([-0.1] * 3)


def test_weights_with_a_zero_or_missing_gradient_do_not_move() -> None:
    still, none = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = LaProp([still, none], lr=0.1, clip=0.3, warmup=0)
    still.grad = torch.zeros(2)
    optimizer.step()
    assert (still == 1).all() and (none == 1).all()


def test_groups_have_their_own_rates() -> None:
    a, b = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(1.0))
    groups = [{"params": [a], "lr": 0.1}, {"params": [b], "lr": 0.01}]
    optimizer = LaProp(groups, lr=5.0, clip=0.3, warmup=0)
    a.grad, b.grad = torch.tensor(1.0), torch.tensor(1.0)
    optimizer.step()
    assert (a.item(), b.item()) == pytest.approx((0.9, 0.99))


def test_the_state_can_be_saved_and_loaded() -> None:
    parameter = nn.Parameter(torch.tensor(0.8))
    optimizer = LaProp([parameter], lr=0.1, clip=0.3, warmup=4)
    whole = run(optimizer, parameter, GRADS)

    parameter = nn.Parameter(torch.tensor(0.8))
    optimizer = LaProp([parameter], lr=0.1, clip=0.3, warmup=4)
    first = run(optimizer, parameter, GRADS[:3])
    again = nn.Parameter(parameter.detach().clone())
    resumed = LaProp([again], lr=0.1, clip=0.3, warmup=4)
    resumed.load_state_dict(deepcopy(optimizer.state_dict()))
    assert first + run(resumed, again, GRADS[3:]) == whole
