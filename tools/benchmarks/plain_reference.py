"""A plain Dreamer update at given widths, as a reference for the speed of other implementations.

It is not optimized: eager float32, NCHW images, strided and transposed convolutions,
``torch.distributions`` in every loop, a dynamics gradient through imagination, and three Adam
optimizers. It has one prior and no ensemble. It is used only for timing. It runs in the process of
the agent, so that the ratio of their times depends little on the machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch import distributions as td
from torch.nn import functional as F

from latentplan.config.schema import Config
from latentplan.nn.distributions import symexp_bins, symlog
from latentplan.types import Timestep

State = tuple[Tensor, Tensor]  # deter (N, D), stoch (N, S * C)
LEVELS, UNIMIX, DISCOUNT, LAMBDA = 4, 0.01, 0.997, 0.95


@dataclass(frozen=True)
class Widths:
    """The fields of a configuration that the plain update uses."""

    deter: int
    stoch: int
    classes: int
    units: int
    depth: int
    layers: int
    bins: int
    horizon: int

    @classmethod
    def from_config(cls, config: Config) -> Widths:
        """The widths of the world model in a configuration."""
        w = config.world
        return cls(
            *(w.deter, w.stoch, w.classes, w.units, w.depth, w.layers, w.bins),
            config.behavior.horizon,
        )


def mlp(inputs: int, units: int, layers: int, outputs: int) -> nn.Sequential:
    """``layers`` hidden layers with normalization, and a linear output layer."""
    parts: list[nn.Module] = []
    for _ in range(layers):
        parts += [nn.Linear(inputs, units, bias=False), nn.LayerNorm(units, eps=1e-3), nn.SiLU()]
        inputs = units
    return nn.Sequential(*parts, nn.Linear(inputs, outputs))


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of NCHW images."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Reference(nn.Module):
    """World model, actor and critic. ``size`` is the side of the square images."""

    def __init__(self, widths: Widths, size: int, action_dim: int):
        super().__init__()
        w = self.widths = widths
        self.action_dim = action_dim
        stoch, features = w.stoch * w.classes, w.deter + w.stoch * w.classes
        encoder: list[nn.Module] = []
        decoder: list[nn.Module] = []
        channels = 3
        for level in range(LEVELS):
            wide = w.depth * 2**level
            encoder += [
                nn.Conv2d(channels, wide, 4, 2, 1, bias=False),
                ChannelNorm(wide),
                nn.SiLU(),
            ]
            channels = wide
        self.start = (channels, size // 2**LEVELS, size // 2**LEVELS)
        embed = channels * self.start[1] * self.start[2]
        for level in reversed(range(LEVELS - 1)):
            wide = w.depth * 2**level
            decoder += [nn.ConvTranspose2d(channels, wide, 4, 2, 1, bias=False)]
            decoder += [ChannelNorm(wide), nn.SiLU()]
            channels = wide
        decoder += [nn.ConvTranspose2d(channels, 3, 4, 2, 1)]
        self.encoder, self.decoder = nn.Sequential(*encoder), nn.Sequential(*decoder)
        self.decoder_in = nn.Linear(features, embed)
        self.step_in = mlp(stoch + action_dim, w.units, 0, w.units)
        self.step_norm = nn.LayerNorm(w.units, eps=1e-3)
        self.gates = nn.Linear(w.units + w.deter, 3 * w.deter, bias=False)
        self.gates_norm = nn.LayerNorm(3 * w.deter, eps=1e-3)
        self.prior = mlp(w.deter, w.units, 1, stoch)
        self.posterior = mlp(w.deter + embed, w.units, 1, stoch)
        self.reward = mlp(features, w.units, w.layers, w.bins)
        self.cont = mlp(features, w.units, w.layers, 1)
        self.actor = mlp(features, w.units, w.layers, 2 * action_dim)
        self.critic = mlp(features, w.units, w.layers, w.bins)
        self.slow = mlp(features, w.units, w.layers, w.bins).requires_grad_(False)
        self.register_buffer("bins", symexp_bins(w.bins), persistent=False)
        own = (self.actor, self.critic, self.slow)
        behavior = {id(p) for module in own for p in module.parameters()}
        world = [p for p in self.parameters() if id(p) not in behavior]
        self.optimizers = [
            torch.optim.Adam(list(params), lr=1e-4, eps=1e-8)
            for params in (world, self.actor.parameters(), self.critic.parameters())
        ]

    # --- the world --------------------------------------------------------------------------

    def latent(self, logits: Tensor) -> td.Independent:
        probs = torch.softmax(logits.unflatten(-1, (self.widths.stoch, self.widths.classes)), -1)
        probs = (1 - UNIMIX) * probs + UNIMIX / self.widths.classes
        return td.Independent(td.OneHotCategoricalStraightThrough(probs=probs), 1)

    def recur(self, state: State, action: Tensor) -> Tensor:
        deter, stoch = state
        x = F.silu(self.step_norm(self.step_in(torch.cat([stoch, action], -1))))
        gates = self.gates_norm(self.gates(torch.cat([x, deter], -1)))
        reset, candidate, update = gates.chunk(3, -1)
        update = torch.sigmoid(update - 1)
        return update * torch.tanh(torch.sigmoid(reset) * candidate) + (1 - update) * deter

    def observe(self, embed: Tensor, batch: Timestep) -> tuple[State, Tensor, Tensor]:
        """(B, T, X) -> states (B, T), posterior and prior logits (B, T, S * C)."""
        n, w = embed.shape[0], self.widths
        state = (embed.new_zeros(n, w.deter), embed.new_zeros(n, w.stoch * w.classes))
        rows = []
        for t in range(embed.shape[1]):
            keep = (~batch.is_first[:, t]).float()[:, None]
            deter = self.recur((state[0] * keep, state[1] * keep), batch.prev_action[:, t])
            posterior = self.posterior(torch.cat([deter, embed[:, t]], -1))
            prior = self.prior(deter)
            state = (deter, self.latent(posterior).rsample().flatten(-2))
            rows.append((*state, posterior, prior))
        deter, stoch, posterior, prior = (torch.stack(x, 1) for x in zip(*rows, strict=True))
        return (deter, stoch), posterior, prior

    def encode(self, batch: Timestep) -> Tensor:
        image = next(x for x in batch.obs.values() if x.ndim == 5)
        x = (image.float() / 255 - 0.5).permute(0, 1, 4, 2, 3)
        return self.encoder(x.flatten(0, 1)).flatten(1).unflatten(0, x.shape[:2])

    def decode(self, features: Tensor) -> Tensor:
        x = self.decoder_in(features.flatten(0, -2)).unflatten(-1, self.start)
        return self.decoder(x).permute(0, 2, 3, 1)

    def expected(self, logits: Tensor) -> Tensor:
        return (torch.softmax(logits, -1) * self.bins).sum(-1)

    def two_hot(self, logits: Tensor, target: Tensor) -> Tensor:
        """Log likelihood of two-hot targets (...), on bins in symlog space."""
        grid = symlog(self.bins)
        position = symlog(target).clamp(grid[0], grid[-1])
        low = (torch.bucketize(position, grid, right=True) - 1).clamp(0, len(grid) - 2)
        fraction = (position - grid[low]) / (grid[low + 1] - grid[low])
        hot = F.one_hot(low, len(grid)) * (1 - fraction)[..., None]
        hot = hot + F.one_hot(low + 1, len(grid)) * fraction[..., None]
        return (hot * torch.log_softmax(logits, -1)).sum(-1)

    def world_loss(self, batch: Timestep) -> tuple[Tensor, State]:
        state, posterior, prior = self.observe(self.encode(batch), batch)
        features = torch.cat(state, -1)
        image = next(x for x in batch.obs.values() if x.ndim == 5).flatten(0, 1)
        error = (self.decode(features) - (image.float() / 255 - 0.5)).square().flatten(1).sum(1)
        frozen = lambda logits: self.latent(logits.detach())  # noqa: E731
        dyn = td.kl_divergence(frozen(posterior), self.latent(prior)).clamp(min=1).mean()
        rep = td.kl_divergence(self.latent(posterior), frozen(prior)).clamp(min=1).mean()
        reward = -self.two_hot(self.reward(features), batch.reward).mean()
        alive = (~batch.is_terminal).float()
        cont = td.Bernoulli(logits=self.cont(features).squeeze(-1)).log_prob(alive)
        return error.mean() + 0.5 * dyn + 0.1 * rep + reward - cont.mean(), state

    # --- behavior ---------------------------------------------------------------------------

    def policy(self, features: Tensor) -> td.Independent:
        mean, std = self.actor(features.detach()).chunk(2, -1)
        std = 0.9 * torch.sigmoid(std + 2) + 0.1
        return td.Independent(td.Normal(torch.tanh(mean), std), 1)

    def imagine(self, state: State) -> tuple[Tensor, Tensor]:
        """Features (H + 1, N, F) and actions (H, N, A), with gradients."""
        features, actions = [torch.cat(state, -1)], []
        for _ in range(self.widths.horizon):
            action = self.policy(features[-1]).rsample()
            deter = self.recur(state, action)
            state = (deter, self.latent(self.prior(deter)).rsample().flatten(-2))
            actions.append(action)
            features.append(torch.cat(state, -1))
        return torch.stack(features), torch.stack(actions)

    def behavior_losses(self, state: State) -> tuple[Tensor, Tensor]:
        start = tuple(x.detach().flatten(0, 1) for x in state)
        features, _ = self.imagine(start)
        reward = self.expected(self.reward(features[1:]))
        cont = td.Bernoulli(logits=self.cont(features[1:]).squeeze(-1)).mean * DISCOUNT
        value = self.expected(self.critic(features))
        running, returns = value[-1], []
        for h in reversed(range(len(reward))):
            running = reward[h] + cont[h] * ((1 - LAMBDA) * value[h + 1] + LAMBDA * running)
            returns.append(running)
        target = torch.stack(returns[::-1])
        weight = torch.cat([torch.ones_like(cont[:1]), cont[:-1]]).cumprod(0).detach()
        low, high = torch.quantile(target.detach().flatten(), target.new_tensor([0.05, 0.95]))
        entropy = self.policy(features[:-1]).entropy()
        advantage = (target - value[:-1]) / (high - low).clamp(min=1)
        actor = -(weight * (advantage + 3e-4 * entropy)).mean()
        logits = self.critic(features[:-1].detach())
        slow = self.expected(self.slow(features[:-1].detach()))
        likelihood = self.two_hot(logits, target.detach()) + self.two_hot(logits, slow)
        return actor, -(weight * likelihood).mean()

    # --- an update --------------------------------------------------------------------------

    def update(self, batch: Timestep) -> None:
        """One gradient step of the world model, the actor and the critic."""
        world, state = self.world_loss(batch)
        self._step(0, world)
        # As in dreamerv3-torch, each loss has its own backward pass and its own clipping.
        actor, critic = self.behavior_losses(state)
        self._step(1, actor, retain=True)
        self._step(2, critic)
        with torch.no_grad():
            for slow, fast in zip(self.slow.parameters(), self.critic.parameters(), strict=True):
                slow.lerp_(fast, 0.02)

    def _step(self, index: int, loss: Tensor, retain: bool = False) -> None:
        optimizer = self.optimizers[index]
        params: Sequence[Tensor] = optimizer.param_groups[0]["params"]
        grads = torch.autograd.grad(loss, params, retain_graph=retain)
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        torch.nn.utils.clip_grad_norm_(params, 100.0)
        optimizer.step()
