"""How the agent acts and what its actor and critic learn; the world is known by its verbs only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Protocol

import torch
from einops import rearrange
from torch import Tensor, nn

from latentplan.behavior.conservative import PlannedActing, learn_from_plans
from latentplan.behavior.imagine import Step, imagine
from latentplan.behavior.learn import (
    Planned,
    actor_loss,
    critic_loss,
    make_target,
    replay_returns,
)
from latentplan.behavior.mpdp import (
    Improvement,
    Temperature,
    distillation_loss,
    improve,
    mpdp_metrics,
    roll_out,
)
from latentplan.behavior.nets import Actor, Critic
from latentplan.behavior.planner import Plan, Policy, plan, plan_metrics
from latentplan.behavior.returns import NoveltyScale, ReturnScale
from latentplan.nn.dists import ActionDist
from latentplan.schema import Config
from latentplan.types import Choice, EnvSpec, Latent, Rollout, StepNoise, Timestep


class World(Protocol):
    """What behavior uses of a world model."""

    spec: EnvSpec
    step: Step
    step_unmeasured: Step
    features: Callable[[Latent], Tensor]
    draw_noise: Callable[[int, int, torch.Generator | None], StepNoise]
    lowered: Callable[[], AbstractContextManager]
    requires_grad_: Callable[[bool], object]


class Behavior:
    """Policy, planner, imagination and the losses of actor and critic.

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
        return self.critic.slow(self.world.features(latent)).mean()

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
        with self.world.lowered():
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

    # --- learning ---------------------------------------------------------------------------

    def imagine(self, start: Latent, horizon: int) -> tuple[Rollout, PlannedActing | None]:
        """Follow the actor from N states, or the conservative planner where it plans."""
        n = start.deter.shape[0]
        policy = partial(self.policy, attached=self.mpdp)
        acting = None if self.apart else self._planned_acting(n, policy)
        noise = self.world.draw_noise(n, horizon)

        def sample(latent: Latent, h: int) -> Choice:
            dist = policy(latent)
            noise = torch.randn_like(dist.mean)
            return Choice(dist.rsample(noise), noise)

        step = self.world.step_unmeasured if self.apart else self.step
        window = self.config.mpdp.horizon if self.mpdp else None
        with self.world.lowered():
            rollout = imagine(step, acting or sample, start, horizon, noise, window)
        return rollout, acting

    def _planned_acting(self, n: int, policy: Policy) -> PlannedActing | None:
        c = self.config.plan
        count = round(c.imagine_share * n)
        if c.candidates == 1 or not count:
            return None
        # In another order than the rollout's, whose rows are dealt out to members: a state is not
        # planned by the very member that then moves it.
        rows = torch.randperm(n, device=self.scale.range.device)[:count]
        search = lambda latent, first: self.plan(latent, -c.imagine_rate, first=first)  # noqa: E731
        every = c.replan_every if c.replan_every else c.horizon
        return PlannedActing(policy, search, rows, every)

    def losses(
        self, latent: Latent, batch: Timestep
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Losses of actor and critic from rollouts that start at replayed states (B, T)."""
        c = self.config.behavior
        flat = Latent(*(rearrange(x, "b t ... -> (b t) ...") for x in latent))
        alive = rearrange((~batch.is_terminal).float(), "b t -> (b t)")
        chosen = self.choose_starts(alive.shape[0])
        start, alive = Latent(*(x[chosen] for x in flat)), alive[chosen]
        pathwise = c.gradient == "pathwise"
        with frozen(self.world), torch.set_grad_enabled(pathwise and not self.apart):
            rollout, acting = self.imagine(start, c.horizon)
            features = self.world.features(rollout.latent)
            with self.world.lowered():
                slow = self.critic.slow(features).mean()
        left = features[:, :-1]
        with self.world.lowered():
            dist = self.actor(left.detach())
        bonus = self._entropy_bonus(dist.entropy().detach())
        target = make_target(
            rollout._replace(reward=rollout.reward + bonus), slow[:, 1:], alive, c.discount, c.lam
        )
        self.scale.update(target.returns.detach())
        scale, alpha = self.scale.value, self.temperature.value
        with self.world.lowered():
            critic, baseline = critic_loss(
                self.critic,
                left.detach(),
                target.returns,
                target.weight,
                slow[:, :-1],
                c.slow_scale,
            )
            planned = None
            if acting is not None:
                # An MPDP objective counts every action once, as without lambda.
                lam = (0.0 if self.mpdp else c.lam) if pathwise else None
                planned = learn_from_plans(acting, dist, self.value, scale, c.discount, lam)
        losses = {"value": critic}
        metrics = {}
        if self.mpdp:
            losses["policy"], found = self._improve(
                rollout, left, slow[:, 1:], target.weight, planned
            )
            metrics |= mpdp_metrics(found)
        else:
            losses["policy"] = actor_loss(dist, rollout, target, baseline, scale, alpha, c, planned)
        if self.config.distill.weight:
            losses["distill"], distance = self._distill(acting, dist, target.weight, start)
            metrics["train/plan/distance"] = distance
        if c.target_entropy is not None:
            losses["temperature"] = self.temperature.loss(dist.entropy())
        if c.replay_scale:
            losses["repval"] = c.replay_scale * self._replay_value_loss(
                latent, batch, chosen, target.returns[:, 0].detach()
            )
        metrics |= {
            "train/actor/entropy": dist.entropy().mean().detach(),
            "train/actor/std": dist.std.mean().detach(),
            "train/actor/temperature": alpha,
            "train/critic/value": baseline.mean(),
            "train/critic/return": target.returns.mean().detach(),
            "train/critic/return_scale": scale,
            "imagination/reward": rollout.reward.mean().detach(),
            "imagination/cont": rollout.cont.mean().detach(),
        }
        if acting is not None:
            plans = [found for _, found in acting.plans]
            metrics |= plan_metrics("imagine", plans, -self.config.plan.imagine_rate)
        return losses, metrics

    def _entropy_bonus(self, entropy: Tensor) -> Tensor | float:
        """What is paid for it beside rewards: with MPDP the critic learns the *soft* value."""
        return self.scale.value * self.temperature.value * entropy if self.mpdp else 0.0

    def _improve(
        self,
        rollout: Rollout,
        left: Tensor,
        value: Tensor,
        weight: Tensor,
        planned: Planned | None,
    ) -> tuple[Tensor, Improvement]:
        """The MPDP loss at the starts of every window of a rollout, and what it is made of: from
        the rollout that there is, or where policies are several from one of their own.

        Args:
            left: (N, T, F) features of the states left. value: (N, T) of the states arrived at.
            weight: (N, T) of the states left.
        """
        m, c = self.config.mpdp, self.config.behavior
        count = c.horizon // m.horizon
        windows = partial(_windows, size=m.horizon, count=count)
        weight = windows(weight)
        if self.apart:
            start = Latent(*(windows(x[:, :-1])[:, 0] for x in rollout.latent))
            policy = partial(self.policy, attached=True)
            noise = self.world.draw_noise(weight.shape[0], m.horizon)
            with frozen(self.world), self.world.lowered():
                rollout, entropy = roll_out(self.step, policy, start, m.horizon, step_noise=noise)
                value = self.critic.slow(self.world.features(rollout.latent)[:, 1:]).mean()
        else:
            rollout = rollout._replace(
                reward=windows(rollout.reward),
                cont=windows(rollout.cont),
                uncertainty=rollout.uncertainty
                if rollout.uncertainty is None
                else windows(rollout.uncertainty),
            )
            value, left = windows(value), windows(left)
            left = torch.cat([left[:, :1].detach(), left[:, 1:]], 1)
            with self.world.lowered():
                entropy = self.actor(left).entropy()
            if planned is not None:
                entropy = entropy * windows(planned.learns)
        found = improve(
            rollout,
            entropy,
            value,
            discount=c.discount,
            alpha=self.temperature.value,
            beta=m.beta,
            threshold=m.threshold if m.adaptive_horizon else None,
            reward_scale=self.scale.value,
            uncertainty_scale=self.novelty_scale.value,
        )
        gain = weight[:, 0] * found.objective
        if planned is not None:
            gain = gain + (weight * windows(planned.gain)).sum(1)
        return -gain.mean(), found

    def _distill(
        self, acting: PlannedActing | None, dist: ActionDist, weight: Tensor, start: Latent
    ) -> tuple[Tensor, Tensor]:
        """Loss, and how far the policy (N, H) is from the plans' choices, in nats: the likelihood
        of a fresh sample above that of the chosen action. Plans are those of the conservative
        imagination where there are any, else of the starts."""
        n = weight.shape[0]
        if acting is None:
            rows, plans = torch.arange(n, device=weight.device), None
            plans = [(0, self.plan(start, -self.config.plan.imagine_rate))]
        else:
            rows, plans = acting.rows, acting.plans
        rows, at = rows[:, None], torch.tensor([h for h, _ in plans], device=weight.device)
        there = ActionDist.of(dist.mean[rows, at], dist.std[rows, at])
        action = torch.stack([x.candidates.choice.action[:, :, 0] for _, x in plans], 1)
        score, chosen = (
            torch.stack([getattr(x, k) for _, x in plans], 1) for k in ("score", "action")
        )
        loss = distillation_loss(there, action, score, self.config.distill.temperature)
        distance = -(there.log_prob(chosen) + there.entropy())
        return (
            self.config.distill.weight * (weight[rows, at] * loss).mean(),
            distance.mean().detach(),
        )

    def choose_starts(self, n: int) -> Tensor:
        """Shuffled, since ensemble members are dealt out to blocks of rows; a multiple of M."""
        members = self.config.world.members
        count = round(self.config.behavior.starts_fraction * n) // members * members
        return torch.randperm(n, device=self.scale.range.device)[: max(members, count)]

    def _replay_value_loss(
        self, latent: Latent, batch: Timestep, chosen: Tensor, imagined: Tensor
    ) -> Tensor:
        """Ground the critic in real rewards; rows are valued by what was imagined from them."""
        c = self.config.behavior
        features = self.world.features(latent)
        with torch.no_grad():
            slow = self.critic.slow(features).mean()
            bootstrap = slow.flatten().index_copy(0, chosen, imagined).view_as(slow)
            bonus = self._entropy_bonus(self.actor(features[:, :-1]).entropy())
        reward = batch.reward.clone()
        reward[:, 1:] += bonus
        returns, weight = replay_returns(reward, bootstrap, batch.is_first, batch.is_terminal, c)
        loss, _ = critic_loss(
            self.critic, features[:, :-1], returns, weight, slow[:, :-1], c.slow_scale
        )
        return loss


def _windows(x: Tensor, size: int, count: int) -> Tensor:
    """The first ``count`` windows of a rollout, a row each: (N, T, ...) -> (N W, size, ...)."""
    return rearrange(x[:, : size * count], "n (w h) ... -> (n w) h ...", w=count)


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """No gradient reaches the weights inside, while it may still flow through the module."""
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)
