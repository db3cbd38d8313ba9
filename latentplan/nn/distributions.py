"""Distributions as functions and a small class.

``torch.distributions`` is too slow in loops over imagined steps.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

LOG_2PI = math.log(2 * math.pi)


def symlog(x: Tensor) -> Tensor:
    """sign(x) ln(1 + |x|), elementwise (DreamerV3)."""
    return torch.sign(x) * torch.log1p(torch.abs(x))


def symexp(x: Tensor) -> Tensor:
    """The inverse of :func:`symlog`."""
    return torch.sign(x) * torch.expm1(torch.abs(x))


# --- categorical groups ---------------------------------------------------------------------


def mixed_probs(logits: Tensor, unimix: float) -> Tensor:
    """Probabilities of ``(..., S, C)`` logits, mixed with a fraction ``unimix`` of uniform ones."""
    return mix_with_uniform(torch.softmax(logits, -1), unimix)


def mix_with_uniform(probs: Tensor, unimix: float) -> Tensor:
    """Probabilities ``(..., C)`` mixed with a fraction ``unimix`` of uniform ones."""
    uniform = probs.new_full((), unimix / probs.shape[-1])
    return torch.add(uniform, probs, alpha=1 - unimix)  # one pass over memory


class _SampleStraightThrough(torch.autograd.Function):
    """One-hot sample with the gradient of the probabilities, as one node of the graph."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, uniform: Tensor, unimix: float, hardness: Tensor | None
    ) -> Tensor:
        softmax = torch.softmax(logits, -1)
        ctx.save_for_backward(softmax)
        ctx.unimix = unimix
        probs = mix_with_uniform(softmax, unimix)
        # The sample is one where the CDF first reaches the draw. The last entry of the CDF is left
        # out, because rounding can leave it below a draw near one. Indexing would be slower:
        # compilers turn it into loops over single numbers.
        below = (probs.cumsum(-1)[..., :-1] < uniform.unsqueeze(-1)).to(probs.dtype)
        sample = F.pad(below, (1, 0), value=1.0) - F.pad(below, (0, 1))
        return sample if hardness is None else probs.lerp_(sample, hardness)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (softmax,) = ctx.saved_tensors
        weighted = grad * softmax
        return (
            (1 - ctx.unimix) * (weighted - softmax * weighted.sum(-1, keepdim=True)),
            None,
            None,
            None,
        )


def sample_one_hot(
    logits: Tensor, uniform: Tensor, unimix: float, hardness: Tensor | float | None = None
) -> Tensor:
    """Straight-through one-hot samples by inverse CDF.

    Args:
        logits: ``(..., S, C)`` float32.
        uniform: ``(..., S)`` in [0, 1); the same draws give the same sample.
        unimix: fraction of the uniform distribution.
        hardness: () 1 gives the sample, 0 the mixed probabilities, and values between them a
            mixture of both; None is 1.

    Returns:
        ``(..., S, C)``, one-hot at hardness 1; its gradient is that of the mixed probabilities.
    """
    return _SampleStraightThrough.apply(logits, uniform, unimix, hardness)


def categorical_kl(p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL[p || q] in nats, summed over groups: ``(..., S, C)`` -> ``(...)``."""
    return (p * (log_p - log_q)).sum((-2, -1))


# --- symexp two-hot -------------------------------------------------------------------------


class TwoHot:
    """A scalar as a categorical over symexp-spaced bins (DreamerV3, section "Robust predictions").

    Args:
        logits: ``(..., bins)``; an odd number of bins, symmetric about zero.
        bins: ``(bins,)`` from :func:`symexp_bins`.
    """

    def __init__(self, logits: Tensor, bins: Tensor):
        self.logits = logits.float()
        self.bins = bins
        self._log_probs: Tensor | None = None

    def mean(self) -> Tensor:
        """The expected value (...).

        The smallest probability is subtracted from all first. It adds nothing, since the bins are
        symmetric, and a uniform distribution then gives exactly zero. Sums of +-4.8e8 in float32
        would have an error of several units. (Pairs of bins by a flip take four times as long,
        compiled.)
        """
        probs = torch.softmax(self.logits, -1)
        common = probs.detach().amin(-1, keepdim=True)
        return ((probs - common) * self.bins).sum(-1)

    @property
    def log_probs(self) -> Tensor:
        """(..., bins), computed once. (``functools.cached_property`` takes a lock, which cannot be
        compiled.)"""
        if self._log_probs is None:
            self._log_probs = torch.log_softmax(self.logits, -1)
        return self._log_probs

    def log_prob(self, target: Tensor) -> Tensor:
        """Log likelihood of the two-hot encoded ``target``, clamped to the outermost bins.

        Targets of a shape that broadcasts to that of the distributions are repeated.
        """
        target = target.expand(self.logits.shape[:-1]).clamp(self.bins[0], self.bins[-1])
        high = torch.searchsorted(self.bins, target.contiguous()).clamp(1, self.bins.shape[0] - 1)
        low = high - 1
        weight = (target - self.bins[low]) / (self.bins[high] - self.bins[low])
        at_low = self.log_probs.gather(-1, low.unsqueeze(-1)).squeeze(-1)
        at_high = self.log_probs.gather(-1, high.unsqueeze(-1)).squeeze(-1)
        return (1 - weight) * at_low + weight * at_high


def symexp_bins(count: int) -> Tensor:
    """``(count,)`` bin centers symexp(-20 .. 20), exactly symmetric about zero."""
    positive = symexp(torch.linspace(0, 20, count // 2 + 1))
    return torch.cat([-positive[1:].flip(0), positive])


def bernoulli_log_prob(logits: Tensor, target: Tensor) -> Tensor:
    """Log likelihood (...) of ``target`` (...), 0 or 1, under ``logits`` (...)."""
    return -F.binary_cross_entropy_with_logits(logits.float(), target.float(), reduction="none")
