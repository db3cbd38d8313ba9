"""The agent: act, update, imagine. Owns networks and optimizer, knows no process or file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from einops import rearrange
from torch import Tensor, nn

from latentplan.behavior.imagine import follow, imagine
from latentplan.behavior.learn import actor_loss, critic_loss, make_target, replay_returns
from latentplan.behavior.nets import Actor, Critic
from latentplan.behavior.returns import ReturnScale
from latentplan.nn.optim import LaProp
from latentplan.schema import Config
from latentplan.types import Choice, EnvSpec, Latent, Rollout, Timestep
from latentplan.world.model import WorldModel


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

    State that belongs to an environment is an argument and a return value (``carry``), so that
    any number of environments, evaluations and resumed runs share one agent.
    """

    def __init__(self, spec: EnvSpec, config: Config, device: torch.device | str = "cpu"):
        super().__init__()
        device = torch.device(device)
        self.config = config
        self.world = WorldModel(
            spec, config.world, bfloat16=use_bfloat16(config.train.precision, device)
        )
        features, norm = self.world.feature_size, config.world.norm
        self.actor = Actor(features, spec.action_dim, config.behavior, norm)
        self.critic = Critic(features, config.behavior, norm)
        self.scale = ReturnScale(config.behavior.scale_rate)
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
        return self.world.bins.device

    # --- acting -----------------------------------------------------------------------------

    def initial(self, n: int) -> Latent:
        """The carry of ``n`` environments before their first row."""
        return self.world.initial(n)

    @torch.no_grad()
    def act(
        self,
        row: Timestep,
        carry: Latent,
        mode: str = "explore",
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Latent]:
        """Take in one row of N environments and decide.

        Args:
            row: (N, ...) tensors on the agent's device.
            carry: from :meth:`initial` or the previous call.
            mode: ``explore`` samples the policy, ``eval`` takes its mode.
            generator: of the posterior's and the policy's samples; default the global one.

        Returns:
            Actions (N, A) in [-1, 1] and the new carry.
        """
        draw = {"device": self.device, "generator": generator}
        uniform = torch.rand(row.reward.shape[0], self.config.world.stoch, **draw)
        latent = self.world.filter(row, carry, uniform)
        dist = self.actor(self.world.features(latent))
        if mode == "eval":
            return dist.mode, latent
        return dist.rsample(torch.randn(dist.mean.shape, **draw)).clamp(-1, 1), latent

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
        self.world.rssm.updates += 1
        self.critic.follow()
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

    def imagine(self, start: Latent, horizon: int) -> Rollout:
        """Follow the actor (sampling) from N states."""

        def act(latent: Latent, h: int) -> Choice:
            # Detached: an action changes what comes after it, not the states the actor will read.
            dist = self.actor(self.world.features(latent).detach())
            noise = torch.randn_like(dist.mean)
            return Choice(dist.rsample(noise), noise)

        noise = self.world.draw_noise(start.deter.shape[0], horizon)
        with self.world.lowered():
            return imagine(self.world.step_unmeasured, act, start, horizon, noise)

    def _behavior_loss(
        self, latent: Latent, batch: Timestep
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Losses of actor and critic from rollouts that start at replayed states (B, T)."""
        c = self.config.behavior
        discount = 1 - 1 / c.discount_horizon
        flat = Latent(*(rearrange(x, "b t ... -> (b t) ...") for x in latent))
        alive = rearrange((~batch.is_terminal).float(), "b t -> (b t)")
        chosen = self._choose_starts(alive.shape[0])
        start, alive = Latent(*(x[chosen] for x in flat)), alive[chosen]
        with frozen(self.world), torch.set_grad_enabled(c.gradient == "pathwise"):
            rollout = self.imagine(start, c.horizon)
            features = self.world.features(rollout.latent)
            with self.world.lowered():
                slow = self.critic.slow(features).mean()
            target = make_target(rollout, slow[:, 1:], alive, discount, c.lam)
        self.scale.update(target.returns.detach())
        features = features[:, :-1].detach()
        with self.world.lowered():
            dist = self.actor(features)
            critic, baseline = critic_loss(
                self.critic, features, target.returns, target.weight, slow[:, :-1], c.slow_scale
            )
        scale = self.scale.value
        losses = {
            "policy": actor_loss(dist, rollout, target, baseline, scale, c),
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

    # --- looking ----------------------------------------------------------------------------

    @torch.no_grad()
    def open_loop(self, batch: Timestep, context: int) -> dict[str, Tensor]:
        """See ``context`` rows, then predict the rest from the actions alone.

        Args:
            batch: (B, T) rows.

        Returns:
            {name: (B, T, *shape)} decoded: reconstructions first, predictions from ``context`` on.
        """
        posterior, _ = self.world.observe(Timestep(*_first_rows(batch, context)))
        actions = batch.prev_action[:, context:]
        start = Latent(*(x[:, -1] for x in posterior))
        horizon = actions.shape[1]
        noise = self.world.draw_noise(actions.shape[0], horizon)
        rollout = imagine(self.world.step, follow(actions), start, horizon, noise)
        latents = Latent(
            *(torch.cat([a, b[:, 1:]], 1) for a, b in zip(posterior, rollout.latent, strict=True))
        )
        n = actions.shape[0]
        rows = Latent(*(rearrange(x, "b t ... -> (b t) ...") for x in latents))
        decoded = self.world.decode(rows)
        return {k: rearrange(x, "(b t) ... -> b t ...", b=n) for k, x in decoded.items()}


def _first_rows(batch: Timestep, count: int) -> Iterator:
    yield {name: x[:, :count] for name, x in batch.obs.items()}
    yield from (x[:, :count] for x in batch[1:])


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """No gradient reaches the weights inside, while it may still flow through the module."""
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)
