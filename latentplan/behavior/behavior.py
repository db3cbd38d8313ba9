"""How the agent acts and imagines; the world is known by its verbs only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from latentplan.behavior.conservative import PlannedActing
from latentplan.behavior.imagine import Step, imagine, sampled
from latentplan.behavior.nets import Actor, Critic, Temperature
from latentplan.behavior.planner import Plan, Policy, plan
from latentplan.behavior.returns import NoveltyScale, ReturnScale
from latentplan.nn.dists import ActionDist
from latentplan.schema import Config
from latentplan.types import EnvSpec, Latent, Rollout, StepNoise


class World(Protocol):
    """What behavior uses of a world model."""

    spec: EnvSpec
    step: Step
    step_unmeasured: Step
    features: Callable[[Latent], Tensor]
    draw_noise: Callable[[int, int, torch.Generator | None], StepNoise]
    autocast: Callable[[], AbstractContextManager]
    requires_grad_: Callable[[bool], object]


class Behavior:
    """Policy, value, planner and imagination.

    It owns no weights: they are the agent's, which registers and saves them.
    """

    def __init__(
        self,
        world: World,
        actor: Actor,
        critic: Critic,
        scale: ReturnScale,
        novelty_scale: NoveltyScale,
        temperature: Temperature,
        config: Config,
    ):
        self.world, self.actor, self.critic, self.config = world, actor, critic, config
        self.scale, self.novelty_scale, self.temperature = scale, novelty_scale, temperature
        self.mpdp = config.behavior.improvement == "mpdp"
        # Several policies make rollouts of their own: those of the critic follow pi_0 alone.
        self.apart = self.mpdp and config.mpdp.policies == "per_step"

    @property
    def step(self) -> Step:
        """One imagined step, with the uncertainty where the objective asks for it."""
        asked = self.config.mpdp.beta or self.config.mpdp.adaptive_horizon
        return self.world.step if self.mpdp and asked else self.world.step_unmeasured

    def policy(self, latent: Latent, step: int = 0, attached: bool = False) -> ActionDist:
        """The actor at latents (...), as it would be ``step`` steps ahead.

        On detached features, Dreamer's way, an action changes what comes after it, not the states
        that the actor will read. ``attached``, the objective's whole gradient is taken.
        """
        features = self.world.features(latent)
        return self.actor(features if attached else features.detach(), step)

    def value(self, latent: Latent) -> Tensor:
        """What the slow critic says of latents (...): (...)."""
        return self.critic.slow_value(self.world.features(latent))

    def plan(
        self,
        latent: Latent,
        optimism: float,
        generator: torch.Generator | None = None,
        first: ActionDist | None = None,
    ) -> Plan:
        """UP-MPC from N latents, in the units that the configuration asks for.

        Args:
            first: the policy there, if known.
        """
        c, n = self.config.plan, latent.deter.shape[0]
        draw = {"device": latent.deter.device, "generator": generator}
        shape = (n, c.candidates, c.horizon, self.world.spec.action_dim)
        with self.world.autocast():
            return plan(
                self.world.step if optimism else self.world.step_unmeasured,
                self.policy,
                latent,
                first=first,
                candidates=c.candidates,
                horizon=c.horizon,
                optimism=optimism,
                discount=self.config.behavior.discount if c.discount else 1.0,
                value=self.value if c.value else None,
                reward_scale=self.scale.value if c.normalize_reward else 1.0,
                uncertainty_scale=self.novelty_scale.value if c.normalize_uncertainty else 1.0,
                noise=torch.randn(shape, **draw),
                step_noise=self.world.draw_noise(n, c.horizon, generator),
            )

    def imagine(self, start: Latent, horizon: int) -> tuple[Rollout, PlannedActing | None]:
        """Follow the actor from N states, or the conservative planner where it plans."""
        n = start.deter.shape[0]
        policy = partial(self.policy, attached=self.mpdp)
        rows = self._planned_rows(n)
        acting = None if rows is None else self.conservative(rows, policy)
        noise = self.world.draw_noise(n, horizon)
        act = acting or sampled(lambda latent, h: policy(latent))
        step = self.world.step_unmeasured if self.apart else self.step
        window = self.config.mpdp.horizon if self.mpdp else None
        with self.world.autocast():
            rollout = imagine(step, act, start, horizon, noise, window)
        return rollout, acting

    def _planned_rows(self, n: int) -> Tensor | None:
        """Which of N imagined rows are planned; None where none is."""
        count = round(self.config.plan.imagine_share * n)
        if self.config.plan.candidates == 1 or not count or self.apart:
            return None
        # In another order than the rollout's, whose rows are dealt out to members: the member that
        # plans for a state is drawn anew, and is seldom the one that then moves it.
        return torch.randperm(n, device=self.scale.range.device)[:count]

    def conservative(self, rows: Tensor, policy: Policy | None = None) -> PlannedActing:
        """Imagination's ``act`` that plans for ``rows`` (R,), with a penalty for uncertainty."""
        c = self.config.plan
        search = lambda latent, first: self.plan(latent, -c.imagine_rate, first=first)  # noqa: E731
        return PlannedActing(policy or self.policy, search, rows, c.replan_every or c.horizon)


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """No gradient reaches the weights inside, while it may still flow through the module."""
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)
