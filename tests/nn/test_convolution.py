"""The special convolutions compute the same as those of torch."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from latentplan.nn import convolution
from latentplan.nn.convolution import DoublingConv, HalvingConv

LAYERS = {
    "halving": (HalvingConv, lambda x, m: F.conv2d(x, m.weight, m.bias, stride=2, padding=1)),
    "doubling": (
        DoublingConv,
        lambda x, m: F.conv_transpose2d(x, m.weight, m.bias, stride=2, padding=1),
    ),
}


def gradients(out: torch.Tensor, x: torch.Tensor, layer: nn.Module) -> list[torch.Tensor]:
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return list(torch.autograd.grad((out.float() * weight).sum(), [x, *layer.parameters()]))


@pytest.mark.parametrize(
    ("name", "shape", "by_product"),
    [
        ("halving", (12, 8), False),  # 24 positions, 10 channels of the larger map
        ("halving", (8, 8), True),  # 16
        ("halving", (6, 2), True),  # 3 positions: nine rows, which do not split into two pieces
        ("doubling", (5, 5), False),  # 25 positions, 12 channels
        ("doubling", (4, 6), True),
    ],
)
def test_values_and_gradients_are_those_of_the_convolution(
    name: str, shape: tuple[int, int], by_product: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16 some filter gradients are computed by products.

    They must be close to the float32 gradients.
    """
    torch.manual_seed(0)
    make, plain = LAYERS[name]
    layer = make(10, 12).to(memory_format=torch.channels_last)
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    x = torch.randn(3, 10, *shape).to(memory_format=torch.channels_last).requires_grad_()
    exact = plain(x, layer)
    wanted = [exact, *gradients(exact, x, layer)]
    out = layer(x)
    torch.testing.assert_close([out, *gradients(out, x, layer)], wanted, rtol=1e-4, atol=1e-4)
    calls = []
    product = convolution.weight_gradient
    monkeypatch.setattr(
        convolution, "weight_gradient", lambda *given: calls.append(1) or product(*given)
    )
    # At a time: two of the three maps of 8 x 8, all of the smaller maps, one map that is doubled.
    monkeypatch.setattr(convolution, "WINDOWS", 2 * 16 * 160)
    half = x.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(half)
    got = [out, *gradients(out, half, layer)]
    assert len(calls) == by_product
    for a, b in zip(got, wanted, strict=True):
        assert (a.float() - b).norm() < 0.01 * b.norm()
        assert a.shape == b.shape


def test_the_weights_gradient_is_an_operator_that_compiles() -> None:
    large, small = (
        torch.randn(2, channels, side, side).to(memory_format=torch.channels_last)
        for channels, side in ((3, 8), (5, 4))
    )
    torch.library.opcheck(torch.ops.latentplan.halving_weight_gradient, (large, small))


def test_an_input_that_needs_no_gradient_gets_none() -> None:
    layer = HalvingConv(3, 4).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 8, 8).bfloat16().to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x).float().sum().backward()
    assert x.grad is None and layer.weight.grad is not None
