"""Returns, and the running scales of returns and uncertainty."""

from __future__ import annotations

import torch
from torch import Tensor, nn


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
        low, high = torch.quantile(returns.float().flatten(), self.levels)
        self.range.lerp_(high - low, self.rate)
        self.count.add_(1)

    @property
    def value(self) -> Tensor:
        """() the scale S, corrected for its start at zero."""
        correction = 1 - (1 - self.rate) ** self.count.clamp(min=1)
        return (self.range / correction).clamp(min=1.0)


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
