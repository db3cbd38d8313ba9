"""Returns, and the running scales of returns and uncertainty."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from latentplan.nn.distributed import average_over_ranks, gather_rows


def lambda_returns(
    reward: Tensor, value: Tensor, discount: Tensor, lam: float, last: Tensor | None = None
) -> Tensor:
    """TD(lambda) targets, R_h = r_h + d_h ((1 - lam) v_h + lam R_{h+1}), R_H = v_H.

    Index h is "arriving at state h + 1" (see ``types.py``).

    Args:
        reward: (N, H). value: (N, H) of the states arrived at. discount: (N, H), gamma * cont.
        lam: 0 for one-step targets, 1 for Monte Carlo.
        last: (N, H) bool; the trajectory was cut after this arrival, so its value replaces the
            rest.

    Returns:
        (N, H): the return from the state *left* at h.
    """
    mix = torch.full_like(value, lam)
    mix[:, -1] = 0.0
    if last is not None:
        mix = torch.where(last, torch.zeros_like(mix), mix)
    base = reward + discount * (1 - mix) * value
    decay = discount * mix
    running = torch.zeros_like(reward[:, 0])
    returns = []
    for h in reversed(range(reward.shape[1])):
        running = base[:, h] + decay[:, h] * running
        returns.append(running)
    return torch.stack(returns[::-1], 1)


def discounts(cont: Tensor, discount: float) -> tuple[Tensor, Tensor]:
    """The discounts d_0 .. d_{P-1} (..., P) of the steps of a rollout, and d_P (...) after it.

    Args:
        cont: (..., P) probability that the episode continues.
        discount: per step.
    """
    decay = (discount * cont).cumprod(-1)
    return torch.cat([torch.ones_like(decay[..., :1]), decay[..., :-1]], -1), decay[..., -1]


def trust(uncertainty: Tensor, caution: float) -> Tensor:
    """Weights of the steps of a rollout, which fall where the model is uncertain.

    A step weighs 1 / (1 + caution * u), multiplied along the rollout, since a step after an
    uncertain one is uncertain too (WIMLE weighs single steps so).

    Args:
        uncertainty: (N, H) in units of its scale. caution: 0 gives 1 everywhere.

    Returns:
        (N, H) in (0, 1], without a gradient.
    """
    return (1 / (1 + caution * uncertainty.detach())).cumprod(1)


class ReturnScale(nn.Module):
    """Running range between the 5th and 95th percentile of returns (DreamerV3, "Actor learning").

    It is at least 1, so large returns are scaled down and small ones are not scaled up.
    """

    range: Tensor
    count: Tensor
    levels: Tensor

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate
        self.register_buffer("range", torch.zeros(()))
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("levels", torch.tensor([0.05, 0.95]), persistent=False)

    @torch.no_grad()
    def update(self, returns: Tensor) -> None:
        """Update with returns (N, ...) of every rank. If one is not finite, nothing changes."""
        returns = gather_rows(returns)
        low, high = torch.quantile(returns.float().flatten(), self.levels)
        range_, finite = high - low, returns.isfinite().all()
        self.range.copy_(torch.where(finite, self.range.lerp(range_, self.rate), self.range))
        self.count.add_(finite)

    @property
    def value(self) -> Tensor:
        """() the scale S, corrected for its start at zero."""
        correction = 1 - (1 - self.rate) ** self.count.clamp(min=1)
        return (self.range / correction).clamp(min=1.0)


class BonusScale(nn.Module):
    """Running spreads of return and uncertainty over the candidates of a plan.

    Divided by this scale, the uncertainty has the spread of the return. Its rate is then the share
    of the return's spread that a bonus may outweigh. Where candidates hardly differ in return, as
    before the first reward is found, ``FLOOR`` takes the place of the return's spread.
    """

    FLOOR = 0.01  # in return scales
    spreads: Tensor
    count: Tensor

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate
        self.register_buffer("spreads", torch.zeros(2))
        self.register_buffer("count", torch.zeros(()))

    @torch.no_grad()
    def update(self, spreads: Tensor) -> None:
        """Update with the spreads (2,) of return and uncertainty, averaged over states.

        Spreads that are not finite, as those of a diverging rollout, change nothing.
        """
        finite = spreads.isfinite().all()
        self.spreads.copy_(torch.where(finite, self.spreads.lerp(spreads, self.rate), self.spreads))
        self.count.add_(finite)

    def average_over_ranks(self) -> None:
        """Take the mean of the ranks' spreads, which follow the states of each rank."""
        average_over_ranks([self.spreads, self.count])

    @property
    def value(self) -> Tensor:
        """() the scale, in units of uncertainty per return scale; 1 before the first plan."""
        correction = 1 - (1 - self.rate) ** self.count.clamp(min=1)
        ret, uncertainty = (self.spreads / correction).unbind()
        scale = uncertainty.clamp(min=1e-8) / ret.clamp(min=self.FLOOR)
        return torch.where(self.count > 0, scale, torch.ones_like(scale))


class UncertaintyScale(nn.Module):
    """Largest running value so far of the uncertainty's 95th percentile on replayed rows.

    The scale never decreases. The uncertainty shrinks as the model learns; with a scale that shrank
    along, a bonus for it would never fade. The first ``warmup`` updates are an exception, because
    the members then disagree by their initialization, 10 to 30 times as much as later.
    """

    recent: Tensor
    largest: Tensor
    count: Tensor

    def __init__(self, rate: float, warmup: int):
        super().__init__()
        self.rate, self.warmup = rate, max(1, warmup)
        self.register_buffer("recent", torch.zeros(()))
        self.register_buffer("largest", torch.ones(()))
        self.register_buffer("count", torch.zeros(()))

    @torch.no_grad()
    def update(self, high: Tensor) -> None:
        """Update with the percentile () of a batch."""
        self.count.add_(1)
        warming = self.count <= self.warmup
        self.recent.copy_(torch.where(warming, high, self.recent.lerp(high, self.rate)))
        self.largest.copy_(
            torch.where(warming, self.recent, torch.maximum(self.largest, self.recent))
        )

    @property
    def value(self) -> Tensor:
        """() the scale U; 1 before the first batch."""
        return self.largest.clamp(min=1e-8)

    @property
    def remaining(self) -> Tensor:
        """() the present uncertainty as a fraction of the scale, from 1 towards 0; 1 before the
        first batch."""
        fraction = (self.recent / self.value).clamp(min=1e-3)
        return torch.where(self.count > 0, fraction, torch.ones_like(fraction))
