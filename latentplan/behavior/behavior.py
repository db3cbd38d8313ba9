"""How the agent acts and what its actor and critic learn; the world is known by its verbs only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from einops import rearrange
from torch import Tensor, nn

from latentplan.behavior.conservative import PlannedActing, learn_from_plans
from latentplan.behavior.imagine import Step, imagine
from latentplan.behavior.learn import actor_loss, critic_loss, make_target, replay_returns
from latentplan.behavior.nets import Actor, Critic
from latentplan.behavior.planner import Plan, plan, plan_metrics
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
        config: Config,
    ):
        self.world, self.actor, self.critic, self.config = world, actor, critic, config
        self.scale, self.novelty_scale = scale, novelty_scale

    def policy(self, latent: Latent) -> ActionDist:
        """The actor at latents (...), on detached features: an action changes what comes after it,
        not the states the actor will read."""
        return self.actor(self.world.features(latent).detach())

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
        acting = self._planned_acting(n)
        noise = self.world.draw_noise(n, horizon)

        def sample(latent: Latent, h: int) -> Choice:
            dist = self.policy(latent)
            noise = torch.randn_like(dist.mean)
            return Choice(dist.rsample(noise), noise)

        with self.world.lowered():
            rollout = imagine(self.world.step_unmeasured, acting or sample, start, horizon, noise)
        return rollout, acting

    def _planned_acting(self, n: int) -> PlannedActing | None:
        c = self.config.plan
        count = round(c.imagine_share * n)
        if c.candidates == 1 or not count:
            return None
        # In another order than the rollout's, whose rows are dealt out to members: a state is not
        # planned by the very member that then moves it.
        rows = torch.randperm(n, device=self.scale.range.device)[:count]
        search = lambda latent, first: self.plan(latent, -c.imagine_rate, first=first)  # noqa: E731
        every = c.replan_every if c.replan_every else c.horizon
        return PlannedActing(self.policy, search, rows, every)

    def losses(
        self, latent: Latent, batch: Timestep
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Losses of actor and critic from rollouts that start at replayed states (B, T)."""
        c = self.config.behavior
        flat = Latent(*(rearrange(x, "b t ... -> (b t) ...") for x in latent))
        alive = rearrange((~batch.is_terminal).float(), "b t -> (b t)")
        chosen = self.choose_starts(alive.shape[0])
        start, alive = Latent(*(x[chosen] for x in flat)), alive[chosen]
        with frozen(self.world), torch.set_grad_enabled(c.gradient == "pathwise"):
            rollout, acting = self.imagine(start, c.horizon)
            features = self.world.features(rollout.latent)
            with self.world.lowered():
                slow = self.critic.slow(features).mean()
            target = make_target(rollout, slow[:, 1:], alive, c.discount, c.lam)
        self.scale.update(target.returns.detach())
        scale = self.scale.value
        features = features[:, :-1].detach()
        with self.world.lowered():
            dist = self.actor(features)
            critic, baseline = critic_loss(
                self.critic, features, target.returns, target.weight, slow[:, :-1], c.slow_scale
            )
            planned = None
            if acting is not None:
                lam = c.lam if c.gradient == "pathwise" else None
                planned = learn_from_plans(acting, dist, self.value, scale, c.discount, lam)
        losses = {
            "policy": actor_loss(dist, rollout, target, baseline, scale, c, planned),
            "value": critic,
        }
        if c.replay_scale:
            losses["repval"] = c.replay_scale * self._replay_value_loss(
                latent, batch, chosen, target.returns[:, 0].detach()
            )
        entropy = dist.entropy().mean().detach()
        metrics = {
            "train/actor/entropy": entropy,
            "train/actor/std": dist.std.mean().detach(),
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
        returns, weight = replay_returns(
            batch.reward, bootstrap, batch.is_first, batch.is_terminal, c
        )
        loss, _ = critic_loss(
            self.critic, features[:, :-1], returns, weight, slow[:, :-1], c.slow_scale
        )
        return loss


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """No gradient reaches the weights inside, while it may still flow through the module."""
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)
