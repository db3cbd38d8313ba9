"""UP-MPC: uncertainty-aware, policy-guided model-predictive control (COPlanner, ICLR 2024).

From every state, K candidates follow the policy through the model for P steps. The first action of
the best candidate is chosen. The sign of one number, ``optimism``, makes uncertainty a bonus (in
the real environment) or a penalty (in imagined rollouts).

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

from latentplan.behavior.imagination import Act, Step, imagine, sampled
from latentplan.behavior.returns import discounts
from latentplan.nn.action_distributions import PolicyDist
from latentplan.types import Choice, Latent, PlanTarget, Rollout, StepNoise

Policy = Callable[[Latent], PolicyDist]
Value = Callable[[Latent], Tensor]


class Refined(NamedTuple):
    """What the cross-entropy method found."""

    target: PlanTarget  # (N) the elites of the last round, by their score without a bonus
    # (2,) of return and uncertainty over the first candidates, mean over states; without optimism
    # the uncertainty has none
    spreads: Tensor


class Plan(NamedTuple):
    """The candidates, their scores, and the choice; nothing in it carries a gradient."""

    action: Tensor  # (N, A) first action of the chosen candidate
    noise: Tensor  # (N, P, A) the policy's noise that made the chosen candidate's actions
    best: Tensor  # (N,) int64 index of the chosen candidate
    score: Tensor  # (N, K) G, -inf where it was not finite
    ret: Tensor  # (N, K) return divided by the reward scale, with the value of the last state
    value: Tensor  # (N, K) the part of ``ret`` that is the value of the last state
    novelty: Tensor  # (N, K) uncertainty divided by its scale; 0 where it was not measured
    candidates: Rollout  # leading axes (N, K)
    refined: Refined | None = None  # of :func:`refine`


@torch.no_grad()
def plan(
    step: Step,
    policy: Policy,
    start: Latent,
    *,
    first: PolicyDist | None = None,
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
        optimism: weight of the uncertainty; > 0 seeks it, < 0 avoids it, 0 ignores it.
        discount: per step, multiplied by the predicted probability that the episode continues.
        value: latents (N, K) -> values (N, K) of the states after the last step; None: zero.
        reward_scale, uncertainty_scale: S and U.
        noise: (N, K, P, A) standard normal noise of the policy; drawn when not given.
        step_noise: the model's randomness (P, N), shared by the candidates of a state. With common
            random numbers, a score tells good actions from lucky dynamics. None: each candidate
            has its own, drawn by ``step``.

    Returns:
        The plan. A score that is not finite wins only where no candidate has a finite one.

    Raises:
        ValueError: optimism is not 0 but ``step`` measures no uncertainty.
    """
    n = start[0].shape[0]
    first = first or policy(start)  # once for all candidates of a state
    first = first.map(lambda x: repeat(x, "n a -> (n k) a", k=candidates))
    starts = start.map(lambda x: repeat(x, "n ... -> (n k) ...", k=candidates))
    if noise is not None:
        noise = rearrange(noise, "n k p a -> p (n k) a")
    if step_noise is not None:
        step_noise = StepNoise(*_shared(step_noise, candidates))

    act = sampled(lambda latent, h: policy(latent) if h else first, noise)
    rollout = _split(imagine(step, act, starts, horizon, step_noise), n)
    return _choose(rollout, optimism, discount, value, reward_scale, uncertainty_scale)


@torch.no_grad()
def refine(
    step: Step,
    policy: Policy,
    start: Latent,
    *,
    first: PolicyDist | None = None,
    candidates: int,
    rounds: int,
    elites: int,
    width: float,
    hold: int = 1,
    horizon: int,
    optimism: float,
    discount: float = 1.0,
    value: Value | None = None,
    reward_scale: Tensor | float = 1.0,
    uncertainty_scale: Tensor | float = 1.0,
    noise: Tensor | None = None,
) -> Plan:
    """Search for the first action by the cross-entropy method, from each of N states.

    Candidates differ in their first action only, and follow the policy's mode from then on, which
    is the mean of continuous actions. With a model that steps to expected states
    (``WorldModel.step_expected``) the score of an action is then free of chance. The first
    candidate of the first round is the policy's mode, and that of a later round is the best action
    so far, so a plan is never scored below the policy's mode. The policy's distribution says which
    other actions are tried; where discrete actions are few, the first round tries all of them.

    Every second candidate holds its first action for ``hold`` steps. Held actions reach states that
    a single deviation from the policy does not (Dabney et al. 2021, "Temporally-Extended
    epsilon-Greedy Exploration").

    Args:
        candidates: K of every round. rounds: R. elites: candidates that the next round is centered
            on. width: smallest standard deviation of the first round's actions, or the fraction of
            uniform probabilities in it.
        hold: steps for which every second candidate takes its first action. Above 1, the second
            candidate holds what the first one takes once, and so tries no action of its own.
        noise: (R, N, K, A) standard normal; drawn when not given.

    The other arguments are those of :func:`plan`.

    Returns:
        The plan of the last round, with :attr:`Plan.refined`.
    """
    n = start[0].shape[0]
    first = first or policy(start)
    starts = start.map(lambda x: repeat(x, "n ... -> (n k) ...", k=candidates))
    kept = first.mode.clamp(-1, 1)
    if noise is None:
        noise = torch.randn(rounds, n, candidates, *kept.shape[1:], device=kept.device)
    holds = (torch.arange(candidates, device=kept.device) % 2 == 1).repeat(n)
    search: PolicyDist | None = None
    plans = []
    for drawn in noise:
        action = search.candidates(drawn) if search else first.first_candidates(drawn, width)
        # One candidate takes it once. If actions are held, another one holds it.
        action[:, : 1 if hold == 1 else 2] = kept[:, None]
        act = _first(action.flatten(0, 1), policy, holds, hold)
        rollout = _split(imagine(step, act, starts, horizon), n)
        plan = _choose(rollout, optimism, discount, value, reward_scale, uncertainty_scale)
        plans.append(plan)
        kept = plan.action
        top = plan.score.topk(elites, 1).indices
        search = first.fitted(action.take_along_dim(top[..., None], 1))
    both = torch.stack([plans[0].ret, plans[0].novelty * uncertainty_scale])
    spreads = both.std(2, correction=0).mean(1)
    return plans[-1]._replace(refined=Refined(_target(plans, elites, optimism), spreads))


def _target(plans: Sequence[Plan], elites: int, optimism: float) -> PlanTarget:
    """What the plans of all rounds teach the policy.

    A bonus for uncertainty is left out of the scores, because the policy must not learn curiosity.
    """
    first, last = (
        x.ret.masked_fill(x.score == -torch.inf, -torch.inf) if optimism > 0 else x.score
        for x in (plans[0], plans[-1])
    )
    top = last.topk(elites, 1).indices
    action = plans[-1].candidates.choice.action[:, :, 0].take_along_dim(top[..., None], 1)
    gain = last.amax(1) - first[:, 0]
    return PlanTarget(action.mean(1), action.std(1, correction=0), gain.nan_to_num(0.0, 0.0, 0.0))


def _first(action: Tensor, policy: Policy, holds: Tensor, hold: int) -> Act:
    """An ``act`` that takes ``action`` (N, A) first, and follows the policy's mode from then on.

    Rows with ``holds`` (N,) take it for ``hold`` steps.
    """
    nothing = torch.zeros_like(action)

    def act(latent: Latent, h: int) -> Choice:
        if h == 0:
            return Choice(action, nothing)
        mode = policy(latent).mode
        return Choice(torch.where(holds[:, None], action, mode) if h < hold else mode, nothing)

    return act


def _choose(
    rollout: Rollout,
    optimism: float,
    discount: float,
    value: Value | None,
    reward_scale: Tensor | float,
    uncertainty_scale: Tensor | float,
) -> Plan:
    """Score the candidates of rollouts (N, K), and choose the best of every state."""
    weight, after = discounts(rollout.cont, discount)
    final = torch.zeros_like(after)
    if value is not None:
        final = after * value(rollout.latent.map(lambda x: x[:, :, -1])) / reward_scale
    ret = (weight * rollout.reward).sum(-1) / reward_scale + final
    novelty = torch.zeros_like(ret)
    if rollout.uncertainty is not None:
        novelty = (weight * rollout.uncertainty).sum(-1) / uncertainty_scale
    elif optimism:
        raise ValueError("The plan needs the uncertainty, which was not measured.")
    # 0 * inf is not a number, so without optimism the uncertainty stays out of the score.
    score = ret + optimism * novelty if optimism else ret
    score = score.masked_fill(~score.isfinite(), -torch.inf)
    best = score.argmax(1)
    rows = torch.arange(best.shape[0], device=best.device)
    return Plan(
        rollout.choice.action[rows, best, 0],
        rollout.choice.noise[rows, best],
        best,
        score,
        ret,
        final,
        novelty,
        rollout,
    )


def plan_metrics(purpose: str, plans: Sequence[Plan], optimism: float) -> dict[str, Tensor]:
    """How much each term of the score differs between candidates, and what the choice gains.

    A spread is the standard deviation over the candidates of a state, averaged over states.
    ``bonus_share`` is the uncertainty's part of the sum of the spreads of return and uncertainty:
    at 0 the rate has no effect, at 1 it decides alone. ``gain`` is the return of the chosen
    candidate minus the mean over candidates. States with a score that is not finite are left out;
    their scores that are not finite are counted as ``invalid``.
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
    """The noise of N states, repeated for every candidate of a state.

    Members that are dealt out in blocks (None) stay: candidates of a state are neighbors.
    """
    member, uniform = noise
    if member is not None:
        member = repeat(member, "p n -> p (n k)", k=candidates)
    return member, repeat(uniform, "p n ... -> p (n k) ...", k=candidates)


def _split(rollout: Rollout, n: int) -> Rollout:
    """Split the leading axis (N K) of every field into (N, K)."""
    parts = lambda x: rearrange(x, "(n k) ... -> n k ...", n=n)  # noqa: E731
    return Rollout(
        latent=rollout.latent.map(parts),
        choice=Choice(*map(parts, rollout.choice)),
        reward=parts(rollout.reward),
        cont=parts(rollout.cont),
        uncertainty=None if rollout.uncertainty is None else parts(rollout.uncertainty),
    )
