"""The one loop in which trajectories are imagined."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from latentplan.nn.action_distributions import PolicyDist
from latentplan.types import Choice, Latent, Prediction, Rollout, StepNoise

Step = Callable[[Latent, Tensor, StepNoise | None], Prediction]
Act = Callable[[Latent, int], Choice]


def follow(actions: Tensor) -> Act:
    """An ``act`` that takes recorded ``actions`` (N, H, A)."""
    nothing = torch.zeros_like(actions[:, 0])
    return lambda latent, h: Choice(actions[:, h], nothing)


def sampled(policy: Callable[[Latent, int], PolicyDist], noise: Tensor | None = None) -> Act:
    """An ``act`` that samples a policy.

    Args:
        policy: latent (N), step h -> distribution over actions (N, A).
        noise: (H, N, A) standard normal; drawn when not given.
    """

    def act(latent: Latent, h: int) -> Choice:
        dist = policy(latent, h)
        drawn = torch.randn_like(dist.mean) if noise is None else noise[h]
        return Choice(dist.rsample(drawn), drawn)

    return act


def imagine(
    step: Step,
    act: Act,
    start: Latent,
    horizon: int,
    noise: StepNoise | None = None,
    window: int | None = None,
) -> Rollout:
    """Follow ``act`` through the model for ``horizon`` steps.

    Args:
        step: the model, one action ahead.
        act: chooses the action in a latent at step h: a policy, a planner, or recorded actions.
        start: (N) states.
        horizon: H.
        noise: the model's randomness with a leading axis H; drawn inside ``step`` when not given.
        window: steps after which the gradient is cut, as if another rollout began there.

    Returns:
        A rollout (N, H). Gradients flow through it unless the caller disables them.
    """
    latents, choices, predictions = [start], [], []
    for h in range(horizon):
        latent = latents[-1]
        if window is not None and h % window == 0:
            latent = latent.map(lambda x: x.detach())
        choice = act(latent, h)
        at_h = None if noise is None else noise.at(h)
        prediction = step(latent, choice.action, at_h)
        choices.append(choice)
        predictions.append(prediction)
        latents.append(prediction.latent)
    uncertainty = [p.uncertainty for p in predictions if p.uncertainty is not None]
    return Rollout(
        latent=Latent(*(torch.stack(x, 1) for x in zip(*latents, strict=True))),
        choice=Choice(*(torch.stack(x, 1) for x in zip(*choices, strict=True))),
        reward=torch.stack([p.reward for p in predictions], 1),
        cont=torch.stack([p.cont for p in predictions], 1),
        uncertainty=torch.stack(uncertainty, 1) if uncertainty else None,
    )
