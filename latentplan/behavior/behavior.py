"""How the agent acts and imagines. The world is used only through the methods of `World`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from latentplan.behavior.conservative import PlannedActing
from latentplan.behavior.imagination import imagine, sampled
from latentplan.behavior.networks import Actor, Critic, Temperature
from latentplan.behavior.planner import Plan, Policy, plan, refine
from latentplan.behavior.returns import BonusScale, ReturnScale, UncertaintyScale
from latentplan.config.schema import Config
from latentplan.nn.action_distributions import PolicyDist
from latentplan.nn.random import Generators, draw_rows
from latentplan.types import EnvSpec, Latent, Prediction, Rollout, StepNoise


class World(Protocol):
    """The part of a world model that behavior uses."""

    spec: EnvSpec

    def step(
        self, latent: Latent, action: Tensor, noise: StepNoise | None = None
    ) -> Prediction: ...

    def step_unmeasured(
        self, latent: Latent, action: Tensor, noise: StepNoise | None = None
    ) -> Prediction: ...

    def step_expected(
        self, latent: Latent, action: Tensor, noise: StepNoise | None = None
    ) -> Prediction: ...

    def step_expected_unmeasured(
        self, latent: Latent, action: Tensor, noise: StepNoise | None = None
    ) -> Prediction: ...

    def features(self, latent: Latent) -> Tensor: ...

    def autocast(self) -> AbstractContextManager[None]: ...

    def draw_noise(
        self, n: int, horizon: int, generator: torch.Generator | None = None
    ) -> StepNoise: ...

    def requires_grad_(self, requires_grad: bool = True) -> object: ...


class Behavior:
    """Policy, value, planner and imagination.

    The weights are the agent's, which registers and saves them.
    """

    def __init__(
        self,
        world: World,
        actor: Actor,
        critic: Critic,
        return_scale: ReturnScale,
        uncertainty_scale: UncertaintyScale,
        bonus_scale: BonusScale,
        temperature: Temperature,
        config: Config,
    ):
        self.world, self.actor, self.critic, self.config = world, actor, critic, config
        self.return_scale, self.uncertainty_scale = return_scale, uncertainty_scale
        self.bonus_scale = bonus_scale
        self.temperature = temperature

    def policy(self, latent: Latent, step: int = 0, attached: bool = False) -> PolicyDist:
        """The action distribution at latents (...).

        Args:
            step: which policy of an actor with one policy per future step.
            attached: let gradients pass from the policy into the latents. Dreamer detaches them:
                an action then changes later rewards, but not the inputs of later decisions.
        """
        features = self.world.features(latent)
        return self.actor(features if attached else features.detach(), step)

    def value(self, latent: Latent) -> Tensor:
        """The slow critic's values of latents: (...) -> (...)."""
        return self.critic.slow_value(self.world.features(latent))

    def plan(
        self,
        latent: Latent,
        optimism: float,
        generator: Generators = None,
        first: PolicyDist | None = None,
    ) -> Plan:
        """Plan with UP-MPC from N latents, by the ``plan`` section of the configuration.

        Args:
            optimism: weight of the uncertainty in the score.
            generator: of the policy's noise and the model's, or one per latent; default the global
                one.
            first: the policy at ``latent``, where the caller has it already.
        """
        c, n, actions = self.config.plan, latent.deter.shape[0], self.world.spec.action_dim
        normal = partial(draw_rows, torch.randn, generator=generator, device=latent.deter.device)
        settings: dict[str, Any] = {
            "first": first,
            "candidates": c.candidates,
            "horizon": c.horizon,
            "optimism": optimism,
            "discount": self.config.behavior.discount if c.discount else 1.0,
            "value": self.value if c.value else None,
            "reward_scale": self.return_scale.value if c.normalize_reward else 1.0,
            "uncertainty_scale": self.uncertainty_scale.value if c.normalize_uncertainty else 1.0,
        }
        with self.world.autocast():
            if c.search == "cross_entropy":
                # A bonus fades as the model learns. A penalty does not.
                fading = self.uncertainty_scale.remaining if optimism > 0 else 1.0
                settings["uncertainty_scale"] = self.bonus_scale.value / fading
                world = self.world
                return refine(
                    world.step_expected if optimism else world.step_expected_unmeasured,
                    self.policy,
                    latent,
                    rounds=c.rounds,
                    elites=c.elites,
                    width=c.width,
                    hold=c.hold,
                    noise=normal((c.rounds, n, c.candidates, actions), axis=1),
                    **settings,
                )
            return plan(
                self.world.step if optimism else self.world.step_unmeasured,
                self.policy,
                latent,
                noise=normal((n, c.candidates, c.horizon, actions)),
                step_noise=self._step_noise(n, generator),
                **settings,
            )

    def _step_noise(self, n: int, generator: Generators) -> StepNoise:
        """The model's noise for plans from ``n`` latents, of each latent's generator if given."""
        horizon = self.config.plan.horizon
        if not isinstance(generator, Sequence):
            return self.world.draw_noise(n, horizon, generator)
        rows = [self.world.draw_noise(1, horizon, of_row) for of_row in generator]
        members = [x.member for x in rows if x.member is not None]
        uniform = torch.cat([x.uniform for x in rows], 1)
        return StepNoise(torch.cat(members, 1) if members else None, uniform)

    def imagine(
        self,
        start: Latent,
        horizon: int,
        *,
        measured: bool = False,
        attached: bool = False,
        window: int | None = None,
        plan: bool = True,
    ) -> tuple[Rollout, PlannedActing | None]:
        """Follow the actor from N states, and the conservative planner where it plans.

        Args:
            measured: compute the uncertainty of every step.
            attached: as of :meth:`policy`.
            window: as of :func:`latentplan.behavior.imagination.imagine`.
            plan: let the planner act in the configured fraction of the rows.

        Returns:
            The rollout (N, horizon), and the planner; None where no row is planned.
        """
        n = start.deter.shape[0]
        policy = partial(self.policy, attached=attached)
        rows = self.choose_planned(n) if plan else None
        acting = None if rows is None else self.conservative(rows, policy)
        noise = self.world.draw_noise(n, horizon)
        act = acting or sampled(lambda latent, h: policy(latent))
        step = self.world.step if measured else self.world.step_unmeasured
        with self.world.autocast():
            rollout = imagine(step, act, start, horizon, noise, window)
        return rollout, acting

    def choose_planned(self, n: int) -> Tensor | None:
        """The rows (R,) of N imagined rollouts that are planned; None where none is."""
        count = round(self.config.plan.imagine_fraction * n)
        if self.config.plan.candidates == 1 or not count:
            return None
        # The rollout's rows are dealt out to members in order. With rows in another order here, the
        # member that plans for a state is drawn anew, and seldom the one that then moves it.
        return torch.randperm(n, device=self.return_scale.range.device)[:count]

    def conservative(self, rows: Tensor, policy: Policy | None = None) -> PlannedActing:
        """An ``act`` for imagination that plans for ``rows`` (R,) and penalizes uncertainty."""
        c = self.config.plan
        search = lambda latent, first: self.plan(latent, -c.imagine_rate, first=first)  # noqa: E731
        return PlannedActing(policy or self.policy, search, rows, c.replan_every or c.horizon)


@contextmanager
def frozen(module: nn.Module | World) -> Iterator[None]:
    """Inside, gradients flow through the module but do not reach its weights."""
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)
