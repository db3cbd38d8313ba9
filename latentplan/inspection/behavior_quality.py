"""How good critic, actor and planner of an agent are in held-out episodes, for a diagnosis.

Values and returns are given in *return scales*, the unit of the actor's loss. In all results, which
are plain values for JSON, None stands for a number that does not exist.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor

from latentplan.agent import Agent
from latentplan.behavior.imagination import Step, imagine, sampled
from latentplan.behavior.planner import Policy, Value
from latentplan.behavior.returns import discounts
from latentplan.inspection.model_quality import Visits, number
from latentplan.types import Choice, Latent, StepNoise, Timestep

STATES = 64  # largest number of states that are planned for
DRAWS = 16  # smallest number of fresh draws of the model that judge a planned action
OWN = 0.5  # largest weight of the critic's own last value in a return that it is compared with


def earned(rows: Timestep, value: Tensor, discount: float) -> tuple[Tensor, Tensor, Tensor]:
    """The discounted returns that were earned from rows (N, T) on.

    Where an episode is cut, ``value`` (N, T) of its last row stands for the rest.

    Returns:
        (N, T) the returns, (N, T) the weights of these last values in them, and (N, T) bool, the
        rows whose return tells something about the value: that weight is at most OWN, or the row
        is in the first half of its episode.
    """
    alive = (~rows.is_terminal).float()
    returns, weight, left = value * alive, alive.clone(), torch.zeros_like(alive)
    since = torch.zeros_like(alive)
    for t in range(1, alive.shape[1]):
        since[:, t] = torch.where(rows.is_first[:, t], 0.0, since[:, t - 1] + 1)
    for t in reversed(range(alive.shape[1] - 1)):
        inside = ~rows.is_first[:, t + 1]
        later = rows.reward[:, t + 1] + discount * returns[:, t + 1]
        returns[:, t] = torch.where(inside, later, returns[:, t])
        weight[:, t] = torch.where(inside, discount * weight[:, t + 1], weight[:, t])
        left[:, t] = torch.where(inside, left[:, t + 1] + 1, 0.0)
    return returns, weight, (left > 0) & ((weight <= OWN) | (since < left))


def compare_values(value: Tensor, returns: Tensor, scale: float) -> dict[str, Any]:
    """Correlation of values (R,) with returns (R,), None if one is constant, and their bias."""
    correlation = torch.corrcoef(torch.stack([value, returns]))[0, 1]
    return {
        "correlation": number(correlation),
        "bias": number((value - returns).mean() / scale),
        "value": number(value.mean()),
        "return": number(returns.mean()),
    }


@torch.no_grad()
def measure_critic(agent: Agent, visits: Visits) -> dict[str, Any]:
    """Compare the slow critic's values with the returns earned by samples of the policy.

    The result is that of :func:`compare_values`, with ``own``, the mean weight of the critic's own
    values in the returns, and ``spread``, the standard deviation over critics (None for one).
    """
    behavior, rows = agent.behavior, visits.rows
    scale = float(agent.return_scale.value)
    with agent.world.autocast():
        values = agent.critic.slow_values(agent.world.features(visits.latent))
        policy = behavior.policy(visits.latent)
    if agent.learner.objective.soft:  # the critic has learned to count entropy as a reward
        reward = rows.reward.clone()
        bonus = agent.return_scale.value * agent.temperature.value * policy.entropy()
        reward[:, 1:] += bonus[:, :-1]
        rows = rows._replace(reward=reward)
    value = values.mean(0)
    returns, weight, telling = earned(rows, value, agent.config.behavior.discount)
    spread = number(values.std(0, correction=0).mean() / scale) if len(values) > 1 else None
    return {
        **compare_values(value[telling], returns[telling], scale),
        "own": number(weight[telling].mean()),
        "spread": spread,
        "return_scale": scale,
    }


@torch.no_grad()
def measure_actor(agent: Agent, visits: Visits) -> dict[str, Any]:
    """The width of the policy over all rows.

    ``std`` is the mean standard deviation of an action in [-1, 1], ``width`` its place between the
    smallest (0) and the largest (1) that the policy may have, and ``entropy`` is in nats per action
    dimension. Of discrete actions, ``width`` and ``entropy`` are fractions of the largest entropy.
    """
    c, dist = agent.config.behavior, agent.behavior.policy(visits.latent)
    return {
        "std": float(dist.std.mean()),
        "width": float(dist.width(c.std_min, c.std_max)),
        "entropy": number(dist.entropy().mean() / agent.actor.entropy_unit),
    }


def held_out_returns(
    step: Step,
    draw_noise: Callable[[int, int], StepNoise],
    policy: Policy,
    value: Value,
    start: Latent,
    first: tuple[Tensor, ...],
    *,
    horizon: int,
    discount: float,
    draws: int,
    sample: bool,
) -> Tensor:
    """Returns of first actions in fresh draws of the model, which are the same for all actions.

    Args:
        step, policy, value, discount, horizon: as of :func:`latentplan.behavior.planner.plan`.
        draw_noise: (rows, horizon) -> noise of the model.
        start: (N) states.
        first: Q first actions (N, A).
        draws: the number of draws, whose mean is the result.
        sample: follow samples of the policy after the first action, else its mean.

    Returns:
        (Q, N) discounted rewards over the horizon, with the value of the last state.
    """
    starts = start.map(lambda x: repeat(x, "n ... -> (d n) ...", d=draws))
    step_noise = draw_noise(starts.deter.shape[0], horizon)
    noise = torch.randn(horizon, *starts.deter.shape[:1], first[0].shape[1]).to(first[0])
    later = sampled(lambda latent, h: policy(latent), noise * sample)

    def returns(action: Tensor) -> Tensor:
        chosen = Choice(repeat(action, "n a -> (d n) a", d=draws), noise[0])
        act = lambda latent, h: later(latent, h) if h else chosen  # noqa: E731
        rollout = imagine(step, act, starts, horizon, step_noise)
        weight, after = discounts(rollout.cont, discount)
        final = value(rollout.latent.map(lambda x: x[:, -1]))
        total = (weight * rollout.reward).sum(1) + after * final
        return rearrange(total, "(d n) -> d n", d=draws).mean(0)

    return torch.stack([returns(action) for action in first])


@torch.no_grad()
def measure_planner(agent: Agent, visits: Visits) -> dict[str, Any]:
    """What the planner's choice gains over the policy's mean action, within the model.

    ``gain`` is measured in fresh draws of the model, with its standard error over states. A planner
    that chooses lucky draws gains nothing there. ``in_sample_gain`` is what the plan itself
    expects: over the policy's mean action in a cross-entropy search, else over the mean candidate.
    """
    c, behavior, world = agent.config, agent.behavior, agent.world
    scale, searches = agent.return_scale.value, c.plan.search == "cross_entropy"
    # The order is random because ensemble members are dealt out to blocks of states.
    chosen = torch.randperm(len(visits.env))[:STATES].to(visits.env.device)
    start = visits.states().map(lambda x: x[chosen])
    plan = behavior.plan(start, 0.0)
    refined = plan.refined
    expected = plan.score.amax(1) - plan.ret.mean(1) if refined is None else refined.target.gain
    with world.autocast():
        planned, own = held_out_returns(
            world.step_unmeasured,
            world.draw_noise,
            behavior.policy,
            behavior.value,
            start,
            (plan.action.clamp(-1, 1), behavior.policy(start).mode),
            horizon=c.plan.horizon,
            discount=c.behavior.discount,
            draws=-(-DRAWS // c.world.members) * c.world.members,
            sample=not searches,
        )
    gain = (planned - own).float() / scale
    return {
        "gain": number(gain.mean()),
        "gain_error": number(gain.std(correction=0) / max(len(gain) - 1, 1) ** 0.5),
        "in_sample_gain": number(expected.mean() / (1 if c.plan.normalize_reward else scale)),
        "states": len(gain),
    }
