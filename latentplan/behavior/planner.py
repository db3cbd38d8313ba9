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

from latentplan.behavior.imagination import Step, imagine, sampled
from latentplan.behavior.returns import discounts
from latentplan.nn.distributions import ActionDist
from latentplan.types import Choice, Latent, Rollout, StepNoise

Policy = Callable[[Latent], ActionDist]
Value = Callable[[Latent], Tensor]


class Plan(NamedTuple):
    """What was considered and what was chosen; nothing in it carries a gradient."""

    action: Tensor  # (N, A) first action of the chosen candidate
    noise: Tensor  # (N, P, A) the policy's noise that made the chosen candidate's actions
    best: Tensor  # (N,) int64, which candidate
    score: Tensor  # (N, K) G, -inf where it was not finite
    ret: Tensor  # (N, K) divided by the reward scale; the value at the end included
    value: Tensor  # (N, K) the part of ``ret`` that is the value at the end
    novelty: Tensor  # (N, K) divided by the uncertainty scale; 0 where it was not measured
    candidates: Rollout  # leading axes (N, K)


@torch.no_grad()
def plan(
    step: Step,
    policy: Policy,
    start: Latent,
    *,
    first: ActionDist | None = None,
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
        step: the model, one action ahead; it must measure uncertainty unless optimism is 0.
        policy: latent (N) -> distribution over actions (N, A).
        start: (N) states.
        first: the policy at ``start``, where the caller has it already.
        candidates: K. horizon: P, steps of each candidate.
        optimism: > 0 seeks what the model does not know, < 0 avoids it, 0 ignores it.
        discount: of a step, multiplied by the predicted probability of going on.
        value: latent (N, K) -> (N, K), what the state after the last step is worth; None: nothing.
        reward_scale, uncertainty_scale: S and U.
        noise: (N, K, P, A) standard normal, of the policy; drawn when not given.
        step_noise: the model's randomness (P, N), *shared* by the candidates of a state: with
            common random numbers lucky dynamics are not mistaken for good actions. None: each
            candidate has its own, drawn by ``step``.

    Returns:
        The plan. A score that is not finite never wins, unless no candidate has a finite one.

    Raises:
        ValueError: optimism about an uncertainty that ``step`` does not measure.
    """
    n = start[0].shape[0]
    first = first or policy(start)  # once for all candidates of a state
    first = ActionDist.from_mean_std(
        *(repeat(x, "n a -> (n k) a", k=candidates) for x in (first.mean, first.std))
    )
    starts = start.map(lambda x: repeat(x, "n ... -> (n k) ...", k=candidates))
    if noise is not None:
        noise = rearrange(noise, "n k p a -> p (n k) a")
    if step_noise is not None:
        step_noise = StepNoise(*_shared(step_noise, candidates))

    act = sampled(lambda latent, h: policy(latent) if h else first, noise)
    rollout = _split(imagine(step, act, starts, horizon, step_noise), n)
    weight, after = discounts(rollout.cont, discount)
    worth = torch.zeros_like(after)
    if value is not None:
        worth = after * value(rollout.latent.map(lambda x: x[:, :, -1])) / reward_scale
    ret = (weight * rollout.reward).sum(-1) / reward_scale + worth
    novelty = torch.zeros_like(ret)
    if rollout.uncertainty is not None:
        novelty = (weight * rollout.uncertainty).sum(-1) / uncertainty_scale
    elif optimism:
        raise ValueError("The uncertainty that a plan is asked to weigh is not measured.")
    # 0 * inf is not a number: without optimism the uncertainty must not be able to spoil a score.
    score = ret + optimism * novelty if optimism else ret
    score = score.masked_fill(~score.isfinite(), -torch.inf)
    best = score.argmax(1)
    rows = torch.arange(n, device=best.device)
    return Plan(
        rollout.choice.action[rows, best, 0],
        rollout.choice.noise[rows, best],
        best,
        score,
        ret,
        worth,
        novelty,
        rollout,
    )


def plan_metrics(purpose: str, plans: Sequence[Plan], optimism: float) -> dict[str, Tensor]:
    """What to watch: how far each term of the score tells candidates apart, what choosing brings.

    A spread is the standard deviation over the candidates of a state, averaged over states.
    ``bonus_share`` is that of the uncertainty in both: 0 the rate does nothing, 1 everything.
    ``gain`` is the return of the chosen candidate above the average one. States with a score that
    is not finite are left out and their candidates counted as ``invalid``.
    """
    score, ret, value, novelty = (
        torch.cat([getattr(x, name) for x in plans])
        for name in ("score", "ret", "value", "novelty")
    )
    best = torch.cat([x.best for x in plans])
    valid = score.isfinite().all(1)

    def mean(x: Tensor) -> Tensor:
        return torch.where(valid, x, 0.0).sum() / valid.sum().clamp(min=1)

    spread = lambda x: mean(x.std(1, correction=0))  # noqa: E731
    bonus = abs(optimism) * spread(novelty) if optimism else torch.zeros(())
    values = {
        "reward_spread": spread(ret - value),
        "value_spread": spread(value),
        "bonus_spread": bonus,
        "bonus_share": bonus / (spread(ret) + bonus).clamp(min=1e-12),
        "gain": mean(ret.gather(1, best[:, None])[:, 0] - ret.mean(1)),
        "invalid": (~score.isfinite()).sum(),
    }
    return {f"train/plan/{purpose}_{name}": x for name, x in values.items()}


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
        latent=rollout.latent.map(parts),
        choice=Choice(*map(parts, rollout.choice)),
        reward=parts(rollout.reward),
        cont=parts(rollout.cont),
        uncertainty=None if rollout.uncertainty is None else parts(rollout.uncertainty),
    )
