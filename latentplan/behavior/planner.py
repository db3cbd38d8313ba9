"""UP-MPC: uncertainty-aware, policy-guided model-predictive control (COPlanner, ICLR 2024).

From every state, K candidates follow the policy through the model for P steps; the first action of
the best is chosen. One signed number, ``optimism``, makes uncertainty a bonus (in the real
environment) or a penalty (inside imagined rollouts).

    G^k = ret^k + optimism * novelty^k
    ret = sum_i d_i r_i / S + d_P v(z_P) / S        novelty = sum_i d_i u_i / U
    d_0 = 1,  d_{i+1} = d_i * discount * c_{i+1}
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from einops import rearrange, repeat
from torch import Tensor

from latentplan.behavior.imagine import Step, imagine
from latentplan.nn.dists import ActionDist
from latentplan.types import Choice, Latent, Rollout, StepNoise

Policy = Callable[[Latent], ActionDist]
Value = Callable[[Latent], Tensor]


class Plan(NamedTuple):
    """What was considered and what was chosen; nothing in it carries a gradient."""

    action: Tensor  # (N, A) first action of the chosen candidate
    noise: Tensor  # (N, P, A) the policy's noise that made the chosen candidate's actions
    best: Tensor  # (N,) int64, which candidate
    score: Tensor  # (N, K) G, -inf where it was not finite
    ret: Tensor  # (N, K) in units of the reward scale
    novelty: Tensor  # (N, K) in units of the uncertainty scale
    candidates: Rollout  # leading axes (N, K)


@torch.no_grad()
def plan(
    step: Step,
    policy: Policy,
    start: Latent,
    *,
    candidates: int,
    horizon: int,
    optimism: float,
    discount: float = 1.0,
    value: Value | None = None,
    reward_scale: Tensor | float = 1.0,
    uncertainty_scale: Tensor | float = 1.0,
    noise: Tensor | None = None,
    step_noise: StepNoise | None = None,
) -> Plan:
    """Choose among ``candidates`` rollouts of the policy from each of N states.

    Args:
        step: the model, one action ahead; its predictions must carry an uncertainty.
        policy: latent (N) -> distribution over actions (N, A).
        start: (N) states.
        candidates: K. horizon: P, steps of each candidate.
        optimism: > 0 seeks what the model does not know, < 0 avoids it, 0 ignores it.
        discount: of a step, multiplied by the predicted probability of going on.
        value: latent (N) -> (N,), what the state after the last step is worth; None: nothing.
        reward_scale, uncertainty_scale: S and U.
        noise: (N, K, P, A) standard normal, of the policy; drawn when not given.
        step_noise: the model's randomness (P, N), *shared* by the candidates of a state: with
            common random numbers lucky dynamics are not mistaken for good actions. None: each
            candidate has its own, drawn by ``step``.

    Returns:
        The plan. A score that is not finite never wins, unless no candidate has a finite one.
    """
    n = start[0].shape[0]
    starts = Latent(*(repeat(x, "n ... -> (n k) ...", k=candidates) for x in start))
    if noise is not None:
        noise = rearrange(noise, "n k p a -> p (n k) a")
    if step_noise is not None:
        step_noise = StepNoise(*_shared(step_noise, candidates))

    def act(latent: Latent, h: int) -> Choice:
        dist = policy(latent)
        drawn = torch.randn_like(dist.mean) if noise is None else noise[h]
        return Choice(dist.rsample(drawn), drawn)

    rollout = imagine(step, act, starts, horizon, step_noise)
    decay = (discount * rollout.cont).cumprod(1)
    weight = torch.cat([torch.ones_like(decay[:, :1]), decay[:, :-1]], 1)
    ret = (weight * rollout.reward).sum(1)
    if value is not None:
        ret = ret + decay[:, -1] * value(Latent(*(x[:, -1] for x in rollout.latent)))
    novelty = (weight * rollout.uncertainty).sum(1)
    ret, novelty = (
        rearrange(x / scale, "(n k) -> n k", n=n)
        for x, scale in ((ret, reward_scale), (novelty, uncertainty_scale))
    )
    # 0 * inf is not a number: without optimism the uncertainty must not be able to spoil a score.
    score = ret + optimism * novelty if optimism else ret
    score = score.masked_fill(~score.isfinite(), -torch.inf)
    best = score.argmax(1)
    split = _split(rollout, n)
    rows = torch.arange(n, device=best.device)
    chosen = split.choice.noise[rows, best]
    return Plan(split.choice.action[rows, best, 0], chosen, best, score, ret, novelty, split)


def bonus_share(plan: Plan, optimism: float) -> Tensor:
    """() Share of the uncertainty in what tells candidates apart: 0 the rate does nothing, 1 all.

    Spreads are standard deviations over the candidates of a state, averaged over states.
    """
    valid = plan.score.isfinite().all(1)
    ret, bonus = plan.ret[valid], optimism * plan.novelty[valid]
    ret_spread, bonus_spread = (x.std(1, correction=0).mean() for x in (ret, bonus))
    return bonus_spread / (ret_spread + bonus_spread).clamp(min=1e-12)


def plan_metrics(purpose: str, plans: Sequence[Plan], optimism: float) -> dict[str, Tensor]:
    """What to watch: does the rate do anything, or everything; are scores finite."""
    mean = lambda values: torch.stack(list(values)).mean()  # noqa: E731
    return {
        f"train/plan/{purpose}_bonus_share": mean(bonus_share(x, optimism) for x in plans),
        f"train/plan/{purpose}_gain": mean(_gain(x) for x in plans),
        f"train/plan/{purpose}_invalid": mean((~x.score.isfinite()).float().sum() for x in plans),
    }


def _gain(plan: Plan) -> Tensor:
    """() What choosing brings over the average candidate, in units of the reward scale."""
    valid = plan.score.isfinite().all(1)
    ret = plan.ret[valid]
    return (ret.gather(1, plan.best[valid, None])[:, 0] - ret.mean(1)).mean()


def _shared(noise: StepNoise, candidates: int) -> tuple[Tensor | None, Tensor]:
    """Every candidate of a state gets the state's noise. Members dealt out in blocks (None) need
    nothing: candidates of a state lie next to each other."""
    member, uniform = noise
    if member is not None:
        member = repeat(member, "p n -> p (n k)", k=candidates)
    return member, repeat(uniform, "p n ... -> p (n k) ...", k=candidates)


def _split(rollout: Rollout, n: int) -> Rollout:
    """Leading axis (N K) -> (N, K) in every field."""
    parts = lambda x: rearrange(x, "(n k) ... -> n k ...", n=n)  # noqa: E731
    return Rollout(
        latent=Latent(*map(parts, rollout.latent)),
        choice=Choice(*map(parts, rollout.choice)),
        reward=parts(rollout.reward),
        cont=parts(rollout.cont),
        uncertainty=parts(rollout.uncertainty),
    )
