"""Conservative imagination: a planner acts in imagined rollouts, and what the actor learns of it.

A chosen action is the best of K, not a sample of the policy. ``log pi * advantage`` of it would be
wrong, and so would the gradient through the noise that made it: chosen noise leans towards what
scores well, and following it widens the policy even where nothing is gained. What is right:

- all K candidates *are* samples, so they estimate the gradient, each against the others
  (:func:`leave_one_out_loss`);
- through the chosen action the return may move the mean, not the deviation.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from latentplan.behavior.planner import Plan, Policy
from latentplan.nn.dists import ActionDist
from latentplan.types import Choice, Latent


class PlannedActing:
    """The ``act`` of :func:`latentplan.behavior.imagine.imagine` that plans for some rows.

    Args:
        policy: acts in the other rows, and in planned rows with the chosen candidate's noise.
        plan: latent (R) -> Plan, conservative.
        rows: (R,) int64, which of the N rows are planned.
        every: steps between plans.

    Attributes:
        plans: (step, plan) of every planning.
    """

    def __init__(self, policy: Policy, plan: Callable[[Latent], Plan], rows: Tensor, every: int):
        self.policy, self.plan, self.rows, self.every = policy, plan, rows, every
        self.plans: list[tuple[int, Plan]] = []

    def __call__(self, latent: Latent, h: int) -> Choice:
        dist = self.policy(latent)
        noise = torch.randn_like(dist.mean)
        if h % self.every == 0:
            chosen = self.plan(Latent(*(x[self.rows].detach() for x in latent)))
            self.plans.append((h, chosen))
        noise = noise.index_copy(0, self.rows, self.plans[-1][1].noise[:, h % self.every])
        spread = dist.std.index_copy(0, self.rows, dist.std[self.rows].detach())
        return Choice(dist.mean + spread * noise, noise)

    def own(self, n: int, horizon: int) -> Tensor:
        """(N, H) 1 where the action was a sample of the policy, 0 where it was planned."""
        own = torch.ones(n, horizon, device=self.rows.device)
        own[self.rows] = 0.0
        return own


def leave_one_out_loss(dist: ActionDist, action: Tensor, ret: Tensor) -> Tensor:
    """Score-function loss of K independent actions per state, each against the mean of the others.

    Its gradient is an unbiased estimate of that of the policy's expected return (Kool et al. 2019).

    Args:
        dist: the policy at the states, (N, A). action: (N, K, A). ret: (N, K).

    Returns:
        (N,), zero gradient where a return is not finite.
    """
    valid = ret.isfinite().all(1)
    ret = ret.masked_fill(~valid[:, None], 0.0)
    others = (ret.sum(1, keepdim=True) - ret) / (ret.shape[1] - 1)
    log_prob = ActionDist.of(dist.mean[:, None], dist.std[:, None]).log_prob(action)
    return -(log_prob * (ret - others).detach()).mean(1)
