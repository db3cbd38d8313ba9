"""The recurrent state-space model with an ensemble of priors.

h_t = f(h_{t-1}, z_{t-1}, a_{t-1})      block GRU
z_t ~ q(z | h_t, e_t)                   posterior
z_t ~ p_m(z | h_t),  m = 1..M           priors, one per ensemble member
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from latentplan.config.schema import WorldConfig
from latentplan.nn.distributions import mixed_probs, sample_one_hot
from latentplan.nn.ensemble import EnsembleMLP
from latentplan.nn.layers import BlockLinear, Linear, make_norm
from latentplan.types import Latent, StepNoise


def bound_action(action: Tensor) -> Tensor:
    """Clip the value of an action to [-1, 1], but not its gradient: samples may lie outside."""
    return action / action.abs().clamp(min=1.0).detach()


class RSSM(nn.Module):
    """Recurrent core, posterior, and an ensemble of priors.

    Shapes: deter (..., D), stoch (..., S, C), posterior logits (..., S, C), priors (M, ..., S, C).
    """

    updates: Tensor

    def __init__(self, config: WorldConfig, action_dim: int, embed_size: int):
        super().__init__()
        c = self.config = config
        self.flat = c.stoch * c.classes
        self.blocks, hidden = c.blocks, c.hidden
        self.stoch_in = Linear(self.flat, hidden, bias=False)
        self.stoch_norm = make_norm(c.norm, hidden)
        # There is no norm: of a single action dimension it would keep only the sign.
        self.action_in = Linear(action_dim, hidden)
        block = c.deter // c.blocks
        # The gates read [own block of h, stoch, action]. The action is known before the scan
        # starts, so its product has weights of its own and is computed outside of the loop.
        # Several blocks also read a projection of the whole h, since they could not see each other
        # otherwise, and have a hidden layer (as published).
        self.deter_in = None
        inputs, outputs = block + hidden, 3 * block
        if c.blocks > 1:
            self.deter_in = Linear(c.deter, hidden, bias=False)
            self.deter_norm = make_norm(c.norm, hidden)
            inputs, outputs = block + 2 * hidden, block
            self.hidden_norm = make_norm(c.norm, block)
            self.gates_hidden = BlockLinear(c.blocks, block, 3 * block)
        self.gates_state = BlockLinear(c.blocks, inputs, outputs)
        self.gates_action = Linear(hidden, c.blocks * outputs)
        self.gates_norm = make_norm(c.norm, 3 * block)
        self.posterior_deter = Linear(c.deter, hidden, bias=False)
        self.posterior_embed = Linear(embed_size, hidden, bias=False)
        self.posterior_norm = make_norm(c.norm, hidden)
        self.posterior_out = Linear(hidden, self.flat)
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.priors = EnsembleMLP(c.members, c.deter, c.member_hidden, 1, self.flat)

    @property
    def hardness(self) -> Tensor | None:
        """() The weight of samples in the states, from 0 to 1; None where it is always 1.

        A code of samples must be rearranged before it can represent something new, so a pole of a
        few pixels stays invisible for thousands of updates. Class probabilities represent it from
        the start. Over the first ``anneal_updates`` the states change from probabilities to
        samples. The result is a tensor, so that a new value neither waits for the device nor causes
        a compilation.
        """
        if not self.config.anneal_updates:
            return None
        return torch.clamp(self.updates / self.config.anneal_updates, max=1.0)

    def _sample(self, logits: Tensor, uniform: Tensor) -> Tensor:
        return sample_one_hot(logits, uniform, self.config.unimix, self.hardness)

    def initial(self, n: int) -> Latent:
        """The state of ``n`` environments before their first row: zeros."""
        weight = self.posterior_out.weight
        return Latent(
            weight.new_zeros(n, self.config.deter),
            weight.new_zeros(n, self.config.stoch, self.config.classes),
        )

    def prepare_action(self, action: Tensor) -> Tensor:
        """Actions (..., A) -> their part of the gates (..., 3 D), or of the hidden layer (..., D)
        where the core has several blocks."""
        return self.gates_action(F.silu(self.action_in(bound_action(action))))

    def recur(self, latent: Latent, prepared_action: Tensor) -> Tensor:
        """The deterministic transition: latent (N), prepared action (N, ...) -> (N, D)."""
        deter, stoch = latent
        x = F.silu(self.stoch_norm(self.stoch_in(stoch.flatten(-2))))
        if self.deter_in is not None:
            x = torch.cat([x, F.silu(self.deter_norm(self.deter_in(deter)))], -1)
        h = rearrange(deter, "n (g d) -> g n d", g=self.blocks)
        gates = self.gates_state(torch.cat([h, x.expand(self.blocks, *x.shape)], -1))
        gates = gates + rearrange(prepared_action, "n (g d) -> g n d", g=self.blocks)
        if self.deter_in is not None:
            gates = self.gates_hidden(F.silu(self.hidden_norm(gates)))
        # The state itself stays in float32 under autocast.
        reset, candidate, update = self.gates_norm(gates).float().chunk(3, -1)
        candidate = torch.tanh(torch.sigmoid(reset) * candidate)
        h = torch.lerp(h, candidate, torch.sigmoid(update - 1))  # -1: remember by default
        return rearrange(h, "g n d -> n (g d)")

    def posterior_logits(self, deter: Tensor, prepared_embed: Tensor) -> Tensor:
        """Posterior logits: (N, D), prepared embedding (N, hidden) -> (N, S, C)."""
        x = F.silu(self.posterior_norm(self.posterior_deter(deter) + prepared_embed))
        return self.posterior_out(x).unflatten(-1, (self.config.stoch, self.config.classes))

    def prior_logits(self, deter: Tensor) -> Tensor:
        """Prior logits (M, N, S, C) of rows (N, D), or of each member's own rows (M, N, D)."""
        return self.priors(deter).unflatten(-1, (self.config.stoch, self.config.classes))

    def imagine_step(
        self, latent: Latent, action: Tensor, noise: StepNoise, all_members: bool
    ) -> tuple[Latent, Tensor | None]:
        """One step without an observation. ``noise`` names the member that moves each row.

        Returns:
            The next latent (N) and, with ``all_members``, every member's logits (M, N, S, C).
        """
        deter = self.recur(latent, self.prepare_action(action))
        members, rows = self.config.members, torch.arange(deter.shape[0], device=deter.device)
        logits = None
        if noise.member is None and not all_members:
            blocks = rearrange(deter, "(m n) d -> m n d", m=members)
            own = rearrange(self.prior_logits(blocks).float(), "m n s c -> (m n) s c")
        else:
            logits = self.prior_logits(deter)
            member = rows * members // len(rows) if noise.member is None else noise.member
            own = logits[member, rows].float()
        return Latent(deter, self._sample(own, noise.uniform)), logits

    def expected_step(self, latent: Latent, action: Tensor) -> tuple[Latent, Tensor]:
        """One step to the expected state, without an observation and without randomness.

        Returns:
            The next latent (N), whose ``stoch`` are class probabilities, averaged over members, and
            the probabilities of every member (M, N, S, C).
        """
        deter = self.recur(latent, self.prepare_action(action))
        probs = mixed_probs(self.prior_logits(deter).float(), self.config.unimix)
        return Latent(deter, probs.mean(0)), probs

    def filter(
        self, latent: Latent, embed: Tensor, action: Tensor, is_first: Tensor, uniform: Tensor
    ) -> Latent:
        """One step with an observation.

        Args:
            latent: (N). embed: (N, X). action: (N, A), which led to this row. is_first: (N,).
            uniform: (N, S) in [0, 1).
        """
        latent, _ = self._filter(
            latent,
            self.prepare_action(action),
            self.posterior_embed(embed),
            (~is_first).to(embed.dtype),
            uniform,
        )
        return latent

    def _filter(
        self, latent: Latent, action: Tensor, embed: Tensor, keep: Tensor, uniform: Tensor
    ) -> tuple[Latent, Tensor]:
        """``keep`` (N,) is 0 in first rows, where the latent state begins anew."""
        latent = Latent(latent.deter * keep[:, None], latent.stoch * keep[:, None, None])
        deter = self.recur(latent, action)
        logits = self.posterior_logits(deter, embed)
        return Latent(deter, self._sample(logits, uniform)), logits

    def observe(
        self,
        embed: Tensor,
        action: Tensor,
        is_first: Tensor,
        uniform: Tensor,
        start: Latent | None = None,
    ) -> tuple[Latent, Tensor]:
        """Filter whole sequences, as T calls of :meth:`filter` would.

        Args:
            embed: (B, T, X). action: (B, T, A), which led to each row. is_first: (B, T).
            uniform: (B, T, S) in [0, 1).
            start: (B) the states before the first rows; None: the initial state.

        Returns:
            Posterior latents (B, T, ...) and logits (B, T, S, C).
        """
        # All that does not depend on the state is computed for all rows at once.
        actions = self.prepare_action(action).unbind(1)
        embeds = self.posterior_embed(embed).unbind(1)
        keeps = (~is_first).to(embed.dtype).unbind(1)
        uniforms = uniform.unbind(1)
        latent = start or self.initial(embed.shape[0])
        deters, stochs, logits = [], [], []
        for inputs in zip(actions, embeds, keeps, uniforms, strict=True):
            latent, logit = self._filter(latent, *inputs)
            deters.append(latent.deter)
            stochs.append(latent.stoch)
            logits.append(logit)
        return Latent(torch.stack(deters, 1), torch.stack(stochs, 1)), torch.stack(logits, 1)
