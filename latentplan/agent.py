"""The agent: act, update, imagine. Owns networks and optimizer, knows no process or file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from einops import rearrange
from torch import Tensor, nn

from latentplan.behavior.conservative import PlannedActing, learn_from_plans
from latentplan.behavior.imagine import imagine
from latentplan.behavior.learn import actor_loss, critic_loss, make_target, replay_returns
from latentplan.behavior.nets import Actor, Critic
from latentplan.behavior.planner import Plan, plan, plan_metrics
from latentplan.behavior.returns import NoveltyScale, ReturnScale
from latentplan.nn.dists import ActionDist
from latentplan.nn.optim import LaProp
from latentplan.schema import Config
from latentplan.types import Choice, EnvSpec, Latent, Rollout, Timestep
from latentplan.world.model import HIGH_UNCERTAINTY, WorldModel


class NonFiniteLossError(RuntimeError):
    """A loss term became NaN or infinite; raised before the weights were touched."""


def use_bfloat16(precision: str, device: torch.device) -> bool:
    """``auto`` takes bfloat16 where the hardware multiplies it natively."""
    if precision != "auto":
        return precision == "bfloat16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return torch.cpu._is_amx_tile_supported()


class Agent(nn.Module):
    """A Dreamer agent with an ensemble of dynamics heads.

    ``world`` may be any model that has what is used here of :class:`WorldModel`: ``spec`` and
    ``feature_size``; initial, filter, features, step, step_unmeasured, draw_noise, lowered,
    fit_pictures, loss (whose metrics name ``HIGH_UNCERTAINTY``), updated. ``config.world`` must say
    its number of ``members``. ``tests/test_plug_and_play.py`` has another model.

    State that belongs to an environment is an argument and a return value (``carry``), so that
    any number of environments, evaluations and resumed runs share one agent.
    """

    def __init__(
        self,
        spec: EnvSpec,
        config: Config,
        device: torch.device | str = "cpu",
        world: WorldModel | None = None,
    ):
        super().__init__()
        device = torch.device(device)
        self.config = config
        self.world = world or WorldModel(
            spec, config.world, bfloat16=use_bfloat16(config.train.precision, device)
        )
        features, norm = self.world.feature_size, config.world.norm
        self.actor = Actor(features, spec.action_dim, config.behavior, norm)
        self.critic = Critic(features, config.behavior, norm)
        self.scale = ReturnScale(config.behavior.scale_rate)
        self.novelty_scale = NoveltyScale(config.behavior.scale_rate, 2 * config.optim.warmup)
        self.to(device)
        o = config.optim
        self.optimizer = LaProp(
            [
                {"params": list(self.world.parameters()), "lr": o.world_lr},
                {"params": list(self.actor.parameters()), "lr": o.actor_lr},
                {"params": list(self.critic.net.parameters()), "lr": o.critic_lr},
            ],
            lr=o.world_lr,
            clip=o.clip,
            warmup=o.warmup,
            beta1=o.beta1,
            beta2=o.beta2,
        )

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    # --- acting -----------------------------------------------------------------------------

    def initial(self, n: int) -> Latent:
        """The carry of ``n`` environments before their first row."""
        return self.world.initial(n)

    @torch.no_grad()
    def act(
        self,
        row: Timestep,
        carry: Latent,
        mode: str = "sample",
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Latent]:
        """Take in one row of N environments and decide.

        Args:
            row: (N, ...) tensors on the agent's device.
            carry: from :meth:`initial` or the previous call.
            mode: the policy's ``mean``, a ``sample`` of it, or what the ``planner`` finds.
            generator: of all samples; default the global one.

        Returns:
            Actions (N, A) in [-1, 1] and the new carry.
        """
        latent = self.world.filter(row, carry, generator=generator)
        if mode == "planner":
            found = self.plan(latent, self.config.plan.act_rate, generator)
            return found.action.clamp(-1, 1), latent
        dist = self.policy(latent)
        if mode == "mean":
            return dist.mode, latent
        noise = torch.randn(dist.mean.shape, device=self.device, generator=generator)
        return dist.rsample(noise).clamp(-1, 1), latent

    @torch.no_grad()
    def explore(self, row: Timestep, carry: Latent) -> tuple[Tensor, Latent, dict[str, Tensor]]:
        """As :meth:`act`, for training: plan optimistically, or sample where nothing is planned.

        Returns:
            Actions (N, A), the new carry, and what the plan was like.
        """
        c = self.config.plan
        if not c.explore or c.candidates == 1:
            return *self.act(row, carry), {}
        latent = self.world.filter(row, carry)
        found = self.plan(latent, c.explore_rate)
        return found.action.clamp(-1, 1), latent, plan_metrics("explore", [found], c.explore_rate)

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
        draw = {"device": self.device, "generator": generator}
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

    def update(self, batch: Timestep, episode: Tensor) -> dict[str, Tensor]:
        """One gradient step of world model, actor and critic.

        Args:
            batch: (B, T) rows on the agent's device. episode: (B, T) int64.

        Returns:
            Metrics as detached tensors, so that nobody waits for the device before writing them.

        Raises:
            NonFiniteLossError: naming the terms; the weights are as before.
        """
        self.optimizer.zero_grad()
        self.world.fit_pictures(batch.obs)
        terms, latent, seen = self.world.loss(batch, episode)
        sum(terms.values()).backward()
        start = Latent(*(x.detach() for x in latent))
        behavior, metrics = self._behavior_loss(start, batch)
        sum(behavior.values()).backward()
        terms |= behavior
        self._require_finite(terms)
        self.optimizer.step()
        self.world.updated()
        self.critic.follow()
        self.novelty_scale.update(seen[HIGH_UNCERTAINTY])
        return {f"train/loss/{k}": v.detach() for k, v in terms.items()} | seen | metrics

    def _require_finite(self, terms: dict[str, Tensor]) -> None:
        """A finite loss can have an infinite gradient: both are looked at before weights move."""
        bad = [name for name, x in terms.items() if not torch.isfinite(x)]
        if bad:
            raise NonFiniteLossError(f"The loss is not finite: {', '.join(bad)}.")
        grads = [p.grad for p in self.parameters() if p.grad is not None]
        if not torch.isfinite(torch.stack(torch._foreach_norm(grads))).all():
            bad = [n for n, p in self.named_parameters() if p.grad is not None]
            bad = [n for n in bad if not torch.isfinite(self.get_parameter(n).grad).all()]
            raise NonFiniteLossError(f"The gradient is not finite: {', '.join(bad[:5])}.")

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
        rows = torch.randperm(n, device=self.device)[:count]
        search = lambda latent, first: self.plan(latent, -c.imagine_rate, first=first)  # noqa: E731
        every = c.replan_every if c.replan_every else c.horizon
        return PlannedActing(self.policy, search, rows, every)

    def _behavior_loss(
        self, latent: Latent, batch: Timestep
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Losses of actor and critic from rollouts that start at replayed states (B, T)."""
        c = self.config.behavior
        flat = Latent(*(rearrange(x, "b t ... -> (b t) ...") for x in latent))
        alive = rearrange((~batch.is_terminal).float(), "b t -> (b t)")
        chosen = self._choose_starts(alive.shape[0])
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

    def _choose_starts(self, n: int) -> Tensor:
        """Shuffled, since ensemble members are dealt out to blocks of rows; a multiple of M."""
        members = self.config.world.members
        count = round(self.config.behavior.starts_fraction * n) // members * members
        return torch.randperm(n, device=self.device)[: max(members, count)]

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
