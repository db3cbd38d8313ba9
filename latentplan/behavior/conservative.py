"""Conservative imagination: a planner acts in imagined rollouts, and the actor learns from it.

The chosen action is the best of K candidates, so it is not a sample of the policy. The score
function ``log pi * advantage`` of it would be biased. The pathwise gradient through its noise would
be biased too: the chosen noise points towards higher scores, which widens the policy even on a
linear score. Two estimators are correct:

- All K candidates are samples of the policy, and each is compared with the others
  (:func:`leave_one_out_loss`).
- The return may move the mean of a continuous action, but not its deviation, through the chosen
  action. The probabilities of discrete actions learn from the candidates alone.

The critic learns the returns of these rollouts. Where every row is planned at every step, that is
the value of the planner; otherwise it is the value of a mixture of planner and policy. With MPDP
the critic learns only from the rows that the policy led.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from latentplan.behavior.losses import Planned
from latentplan.behavior.planner import Plan, Policy, Value
from latentplan.behavior.returns import discounts
from latentplan.nn.action_distributions import PolicyDist
from latentplan.types import Choice, Latent


class PlannedActing:
    """An ``act`` for :func:`latentplan.behavior.imagination.imagine` that plans for some rows.

    Args:
        policy: acts in the other rows, and between plans with the chosen candidate's noise.
        plan: makes a conservative plan from latents (R) and the policy there.
        rows: (R,) int64, the planned ones of the N rows.
        every: steps between plans.

    Attributes:
        plans: every plan with its step; only the last latent of each candidate is kept.
    """

    def __init__(
        self,
        policy: Policy,
        plan: Callable[[Latent, PolicyDist], Plan],
        rows: Tensor,
        every: int,
    ):
        self.policy, self.plan, self.rows, self.every = policy, plan, rows, every
        self.plans: list[tuple[int, Plan]] = []

    def __call__(self, latent: Latent, h: int) -> Choice:
        dist = self.policy(latent)
        noise = torch.randn_like(dist.mean)
        if h % self.every == 0:
            there = latent.map(lambda x: x[self.rows].detach())
            at = dist.map(lambda x: x[self.rows].detach())
            self.plans.append((h, _last_states_only(self.plan(there, at))))
        noise = noise.index_copy(0, self.rows, self.plans[-1][1].noise[:, h % self.every])
        return Choice(dist.chosen(self.rows).rsample(noise), noise)


def learn_from_plans(
    acting: PlannedActing,
    dist: PolicyDist,
    value: Value,
    scale: Tensor,
    discount: float,
    lam: float | None,
) -> Planned:
    """What the actor gains from the candidates of planned rows.

    The candidates' returns use the discount and the value of the behavior, even where the plan's
    score leaves them out: the planner decides only which action is taken.

    Args:
        dist: (N, H) the policy at the states of the rollout.
        value: latents (R, L, K) -> values (R, L, K), for the states after the last step of each
            candidate of L plans.
        scale: () the return scale.
        discount: per step.
        lam: None with the score-function gradient. With the pathwise gradient, the lambda of the
            returns: the mean of continuous actions then learns through the chosen action, and only
            the deviation learns here. The pathwise loss counts an action at step h in every return
            before it, sum_{j<=h} lam^j times, so the gain here has the same weight.
    """
    n, horizon = dist.mean.shape[:2]
    steps = [h for h, _ in acting.plans]
    rollouts = [plan.candidates for _, plan in acting.plans]
    reward, cont = (torch.stack([getattr(x, k) for x in rollouts], 1) for k in ("reward", "cont"))
    action = torch.stack([x.choice.action[:, :, 0] for x in rollouts], 1)
    ends = [x.latent.map(lambda part: part[:, :, -1]) for x in rollouts]
    last = Latent(*(torch.stack(parts, 1) for parts in zip(*ends, strict=True)))
    weight, after = discounts(cont, discount)
    with torch.no_grad():
        ret = ((weight * reward).sum(-1) + after * value(last)) / scale
    rows, at = acting.rows[:, None], torch.tensor(steps, device=acting.rows.device)
    there = dist.map(lambda x: x[rows, at])
    if lam is not None:
        there = there.not_chosen()
    gain = -leave_one_out_loss(there, action, ret)
    if lam is not None:
        gain = gain * (lam ** torch.arange(horizon, device=at.device)).cumsum(0)[at]
    own = torch.ones(n, horizon, device=at.device)
    own[acting.rows] = 0.0
    learns = own.clone()
    learns[rows, at] = 1.0
    return Planned(own, learns, torch.zeros_like(own).index_put((rows, at), gain))


def leave_one_out_loss(dist: PolicyDist, action: Tensor, ret: Tensor) -> Tensor:
    """Score-function loss of K independent actions per state, each against the mean of the others.

    Its gradient is an unbiased estimate of that of the policy's expected return (Kool et al. 2019).

    Args:
        dist: the policy at the states, (..., A). action: (..., K, A). ret: (..., K).

    Returns:
        (...), zero gradient where a return is not finite.
    """
    valid = ret.isfinite().all(-1)
    ret = ret.masked_fill(~valid[..., None], 0.0)
    others = (ret.sum(-1, keepdim=True) - ret) / (ret.shape[-1] - 1)
    log_prob = dist.map(lambda x: x[..., None, :]).log_prob(action)
    return -(log_prob * (ret - others).detach()).mean(-1)


def _last_states_only(plan: Plan) -> Plan:
    """The plan without the intermediate states of its candidates, which take gigabytes at large
    sizes and are not used."""
    last = plan.candidates.latent.map(lambda x: x[:, :, -1:].clone())
    return plan._replace(candidates=plan.candidates._replace(latent=last))
