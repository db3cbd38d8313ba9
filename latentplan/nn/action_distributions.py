"""Distributions over actions: normals for continuous ones, categoricals for discrete ones.

Both classes have the same methods, so that actor, planner and losses ask the distribution and never
the kind of the actions. A discrete action is a one-hot vector (A,), or several one-hot vectors in a
row where an environment takes several choices at once; ``groups`` are their lengths.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from latentplan.nn.distributions import LOG_2PI, mix_with_uniform

_SMALLEST = 1e-8  # frequency whose logarithm is taken


class ActionDist:
    """Independent normals with a tanh mean and a bounded deviation, over actions in [-1, 1].

    Samples may lie outside of [-1, 1]. Environments and the world model clip them.

    Args:
        raw: ``(..., 2 A)`` network output.
        std_min, std_max: range of the standard deviation.
    """

    def __init__(self, raw: Tensor, std_min: float, std_max: float):
        mean, std = raw.float().chunk(2, -1)
        self.mean = torch.tanh(mean)
        self.std = (std_max - std_min) * torch.sigmoid(std + 2.0) + std_min

    @classmethod
    def from_mean_std(cls, mean: Tensor, std: Tensor) -> ActionDist:
        """The distribution with this ``mean`` and ``std`` (..., A)."""
        dist = cls.__new__(cls)
        dist.mean, dist.std = mean, std
        return dist

    def map(self, f: Callable[[Tensor], Tensor]) -> ActionDist:
        """The distribution whose parameters (..., A) are those of ``f``, which may index, repeat or
        detach them."""
        return ActionDist.from_mean_std(f(self.mean), f(self.std))

    @property
    def mode(self) -> Tensor:
        """The most likely action (..., A), which is the mean."""
        return self.mean

    def rsample(self, noise: Tensor | None = None) -> Tensor:
        """``(..., A)``, differentiable; ``noise`` is standard normal and drawn when not given."""
        return self.mean + self.std * (torch.randn_like(self.mean) if noise is None else noise)

    def log_prob(self, action: Tensor) -> Tensor:
        """``(...)`` nats, summed over action dimensions."""
        z = (action - self.mean) / self.std
        return -(0.5 * z.square() + self.std.log() + 0.5 * LOG_2PI).sum(-1)

    def entropy(self) -> Tensor:
        """``(...)`` nats, summed over action dimensions."""
        return (self.std.log() + 0.5 * (LOG_2PI + 1)).sum(-1)

    def width(self, std_min: float, std_max: float) -> Tensor:
        """() How wide the distributions are on average: 0 at ``std_min``, 1 at ``std_max``."""
        return (self.std.mean() - std_min) / max(std_max - std_min, 1e-8)

    # --- what learns from a chosen action, and from compared candidates --------------------------

    def chosen(self, rows: Tensor) -> ActionDist:
        """The distribution (N, A) whose samples in ``rows`` (R,) are a planner's choice.

        The gradient through a chosen action moves the mean. The deviation learns nothing from it,
        because the noise was chosen as well.
        """
        return ActionDist.from_mean_std(
            self.mean, self.std.index_copy(0, rows, self.std[rows].detach())
        )

    def not_chosen(self) -> ActionDist:
        """The part that learns nothing through an action of :meth:`chosen`: the deviation."""
        return ActionDist.from_mean_std(self.mean.detach(), self.std)

    def mean_only(self) -> ActionDist:
        """The distribution whose mean alone can learn."""
        return ActionDist.from_mean_std(self.mean, self.std.detach())

    # --- the search for an action --------------------------------------------------------------

    def first_candidates(self, noise: Tensor, width: float) -> Tensor:
        """Actions (N, K, A) of the first round of a search, around the mean.

        Args:
            noise: (N, K, A) standard normal.
            width: smallest standard deviation of the actions.
        """
        return ActionDist.from_mean_std(self.mean, self.std.clamp(min=width)).candidates(noise)

    def candidates(self, noise: Tensor) -> Tensor:
        """Actions (N, K, A) of a later round, in [-1, 1]; ``noise`` as above."""
        return (self.mean[:, None] + self.std[:, None] * noise).clamp(-1, 1)

    def fitted(self, elites: Tensor) -> ActionDist:
        """The distribution of the next round, fitted to the best actions (N, E, A) of this one."""
        return ActionDist.from_mean_std(elites.mean(1), elites.std(1, correction=0))

    def divergence(self, mean: Tensor, std: Tensor) -> Tensor:
        """KL[plan || policy] in nats, summed over action dimensions (BMPC, 2025).

        Args:
            mean, std: (..., A) mean and positive deviation of the best actions of a plan.

        Returns:
            (...)
        """
        ratio = std / self.std
        shift = (mean - self.mean) / self.std
        return (0.5 * (ratio.square() + shift.square() - 1) - ratio.log()).sum(-1)


class CategoricalActions:
    """Independent categoricals over one-hot actions, mixed with a fraction of uniform ones.

    Args:
        logits: ``(..., A)``, those of all groups in a row.
        groups: the number of choices of each categorical; their sum is A.
        unimix: fraction of the uniform distribution, so that no probability is zero.
    """

    def __init__(self, logits: Tensor, groups: tuple[int, ...], unimix: float):
        self.logits, self.groups, self.unimix = logits.float(), groups, unimix
        self._probs: Tensor | None = None

    def map(self, f: Callable[[Tensor], Tensor]) -> CategoricalActions:
        """The distribution whose logits (..., A) are those of ``f``, which may index, repeat or
        detach them."""
        return CategoricalActions(f(self.logits), self.groups, self.unimix)

    @property
    def mean(self) -> Tensor:
        """The probabilities (..., A), which are the mean of the one-hot actions."""
        if self._probs is None:
            probs = self._by_group(lambda x: torch.softmax(x, -1), self.logits)
            self._probs = self._mix(probs)
        return self._probs

    @property
    def std(self) -> Tensor:
        """(..., A) standard deviation of each entry of the one-hot actions."""
        return (self.mean * (1 - self.mean)).sqrt()

    @property
    def mode(self) -> Tensor:
        """The most likely action (..., A), one-hot."""
        return self._one_hot(self.logits)

    def rsample(self, noise: Tensor | None = None) -> Tensor:
        """One-hot actions ``(..., A)`` with the gradient of the probabilities (straight-through).

        ``noise`` is standard normal as for continuous actions, and drawn when not given. The normal
        CDF turns it into Gumbel noise, so that the largest sum of noise and log-probability is a
        sample. Noise of zeros gives the mode.
        """
        if noise is None:
            noise = torch.randn_like(self.mean)
        gumbel = -torch.log(-torch.special.log_ndtr(noise))
        sample = self._one_hot(self.mean.detach().log() + gumbel)
        return sample + (self.mean - self.mean.detach())  # the difference is exactly zero

    def log_prob(self, action: Tensor) -> Tensor:
        """``(...)`` nats of one-hot actions ``(..., A)``, summed over groups."""
        return (self.mean.log() * action).sum(-1)

    def entropy(self) -> Tensor:
        """``(...)`` nats, summed over groups."""
        return -(self.mean * self.mean.log()).sum(-1)

    def width(self, std_min: float, std_max: float) -> Tensor:
        """() The mean entropy as a fraction of the largest one; the bounds are those of normals."""
        return self.entropy().mean() / sum(map(math.log, self.groups))

    # --- what learns from a chosen action, and from compared candidates --------------------------

    def chosen(self, rows: Tensor) -> CategoricalActions:
        """The distribution (N, A) whose samples in ``rows`` (R,) are a planner's choice.

        No gradient passes through a chosen action. All probabilities learn from the comparison of
        the candidates, whose score function is unbiased.
        """
        return self.map(lambda x: x.index_copy(0, rows, x[rows].detach()))

    def not_chosen(self) -> CategoricalActions:
        """The part that learns nothing through an action of :meth:`chosen`: everything."""
        return self

    def mean_only(self) -> CategoricalActions:
        """The distribution whose mean alone can learn: probabilities have no other part."""
        return self

    # --- the search for an action --------------------------------------------------------------

    def first_candidates(self, noise: Tensor, width: float) -> Tensor:
        """Actions (N, K, A) of the first round of a search.

        Where all combinations of choices fit into K, every one of them occurs, beginning with the
        mode. Else they are samples.

        Args:
            noise: (N, K, A) standard normal.
            width: fraction of uniform probabilities that samples are mixed with.
        """
        count = noise.shape[1]
        if math.prod(self.groups) > count:
            wide = self._mix(self.mean, width).log()
            return CategoricalActions(wide, self.groups, self.unimix).candidates(noise)
        number, parts = torch.arange(count, device=noise.device), []
        for mode in self.mode.split(self.groups, -1):
            choices = mode.shape[-1]
            index = (mode.argmax(-1, keepdim=True) + number) % choices  # (N, K)
            parts.append(torch.nn.functional.one_hot(index, choices).to(noise.dtype))
            number = number // choices
        return torch.cat(parts, -1)

    def candidates(self, noise: Tensor) -> Tensor:
        """Actions (N, K, A) of a later round, samples; ``noise`` as above."""
        return self.map(lambda x: x[:, None]).rsample(noise)

    def fitted(self, elites: Tensor) -> CategoricalActions:
        """The distribution of the next round: the frequencies of the best actions (N, E, A)."""
        logits = elites.mean(1).clamp(min=_SMALLEST).log()
        return CategoricalActions(logits, self.groups, self.unimix)

    def divergence(self, mean: Tensor, std: Tensor) -> Tensor:
        """KL[plan || policy] in nats, summed over groups.

        Args:
            mean: (..., A) frequencies of the choices among the best actions of a plan. They are
                mixed with the policy's fraction of uniform ones.
            std: is not used.

        Returns:
            (...)
        """
        plan = self._mix(mean)
        return (plan * (plan.log() - self.mean.log())).sum(-1)

    # --- groups --------------------------------------------------------------------------------

    def _by_group(self, f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Apply ``f`` to each group of x (..., A)."""
        return torch.cat([f(part) for part in x.split(self.groups, -1)], -1)

    def _mix(self, probs: Tensor, fraction: float | None = None) -> Tensor:
        """Probabilities (..., A) mixed with a fraction, by default unimix, of uniform ones."""
        fraction = self.unimix if fraction is None else fraction
        return self._by_group(lambda x: mix_with_uniform(x, fraction), probs)

    def _one_hot(self, x: Tensor) -> Tensor:
        """One at the largest entry of each group of x (..., A), else zero."""
        largest = lambda x: torch.zeros_like(x).scatter(-1, x.argmax(-1, keepdim=True), 1.0)  # noqa: E731
        return self._by_group(largest, x.detach())


PolicyDist = ActionDist | CategoricalActions


def perturbed(action: Tensor, amount: float, groups: tuple[int, ...]) -> Tensor:
    """Actions (N, A) with noise for exploration.

    Args:
        amount: of continuous actions, the standard deviation of the normal noise; of discrete ones,
            the probability that a choice is replaced by a uniformly random one.
        groups: the numbers of choices of discrete actions; empty: they are continuous.
    """
    noise = torch.randn_like(action)
    if not groups:
        return action + amount * noise
    uniform = CategoricalActions(torch.zeros_like(action), groups, 0.0).rsample(noise)
    replaced = torch.rand(len(action), len(groups), device=action.device) < amount
    sizes = torch.tensor(groups, device=action.device)
    return torch.where(replaced.repeat_interleave(sizes, -1), uniform, action)
