"""The world model: encode, filter, observe, step, decode, loss."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import cast

import torch
from einops import rearrange
from torch import Tensor, nn

from latentplan.config.schema import WorldConfig
from latentplan.nn.cache import cached_rows
from latentplan.nn.distributed import gather_rows
from latentplan.nn.distributions import (
    TwoHot,
    bernoulli_log_prob,
    categorical_kl,
    mixed_probs,
    symexp_bins,
)
from latentplan.nn.ensemble import bootstrap_mask
from latentplan.nn.layers import MLP
from latentplan.nn.random import Generators, draw_rows
from latentplan.types import EnvSpec, Latent, Prediction, StepNoise, Timestep, WorldLoss
from latentplan.world.barlow import Barlow
from latentplan.world.decoder import Decoder
from latentplan.world.encoder import Encoder
from latentplan.world.image_normalizer import PATCH, ImageNormalizer
from latentplan.world.rssm import RSSM, bound_action
from latentplan.world.uncertainty import MEASURES, Probes
from latentplan.world.vector_normalizer import VectorNormalizer


class WorldModel(nn.Module):
    """Dreamer's world model with an ensemble of prior heads.

    Args:
        spec: observations and actions of the environment.
        config: the ``world`` section.
        bfloat16: run convolutions and MLPs over many rows in bfloat16. Scans, KL and likelihoods
            stay in float32: small products are slower in bfloat16, and logarithms need precision.
    """

    bins: Tensor

    def __init__(self, spec: EnvSpec, config: WorldConfig, bfloat16: bool = False):
        super().__init__()
        self.spec, self.config, self.use_bfloat16 = spec, config, bfloat16
        self.feature_size = config.deter + config.stoch * config.classes
        patch = PATCH[config.coder]
        normalizers = {name: ImageNormalizer(spec.obs[name][0], patch) for name in spec.images}
        self.image_normalizers = cast("Mapping[str, ImageNormalizer]", nn.ModuleDict(normalizers))
        standardizers = {name: VectorNormalizer(spec.obs[name][0][0]) for name in spec.vectors}
        self.vector_normalizers = cast(
            "Mapping[str, VectorNormalizer]", nn.ModuleDict(standardizers)
        )
        self.encoder = Encoder(spec, config)
        self.decoder = Decoder(spec, self.feature_size, config)
        self.rssm = RSSM(config, spec.action_dim, self.encoder.size)
        decoder_free = config.representation == "barlow"
        self.barlow = Barlow(self.feature_size, self.encoder.size) if decoder_free else None
        units, layers = config.units, config.layers
        # With a zero output layer the predicted reward starts at exactly 0.
        self.reward = MLP(
            self.feature_size, units, layers, config.bins, norm=config.norm, scale=0.0
        )
        self.cont = MLP(self.feature_size, units, layers, 1, norm=config.norm)
        self.probes = None
        if config.uncertainty == "probes":
            self.probes = Probes(
                config.probe_members,
                self.feature_size,
                spec.action_dim,
                config.probe_units,
                config.stoch * config.classes,
            )
        self.register_buffer("bins", symexp_bins(config.bins), persistent=False)

    def autocast(self) -> torch.autocast:
        """The context for products over many rows."""
        return torch.autocast(self.bins.device.type, torch.bfloat16, enabled=self.use_bfloat16)

    # --- methods on latents -----------------------------------------------------------------

    def features(self, latent: Latent) -> Tensor:
        """The features of latents: (..., D), (..., S, C) -> (..., F)."""
        return torch.cat([latent.deter, latent.stoch.flatten(-2)], -1)

    def initial(self, n: int) -> Latent:
        """The state of ``n`` environments before their first row."""
        return self.rssm.initial(n)

    def prepare(self, obs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Observations {name: (..., *shape)} with images cut into patches, and vectors
        standardized. Encoder and decoder use them in this form."""
        images = {name: x.patchify(obs[name]) for name, x in self.image_normalizers.items()}
        vectors = {name: x.normalize(obs[name]) for name, x in self.vector_normalizers.items()}
        return obs | images | vectors

    def encode(self, obs: dict[str, Tensor]) -> Tensor:
        """The embedding of observations: {name: (..., *shape)} -> (..., X) float32."""
        return self._encode(self.prepare(obs))

    def _encode(self, obs: dict[str, Tensor]) -> Tensor:
        """The embedding of prepared observations."""
        dtype = torch.bfloat16 if self.use_bfloat16 else torch.float32
        images = {name: x.normalize(obs[name], dtype) for name, x in self.image_normalizers.items()}
        with self.autocast():
            return self.encoder(obs | images)

    def filter(
        self,
        row: Timestep,
        latent: Latent,
        uniform: Tensor | None = None,
        generator: Generators = None,
    ) -> Latent:
        """The posterior state (N) after one observed row (N).

        Args:
            latent: the state (N) before the row.
            uniform: (N, S) in [0, 1); drawn by ``generator``, or by one per row, when not given.
        """
        embed = self.encode(row.obs)
        if uniform is None:
            shape = embed.shape[0], self.config.stoch
            uniform = draw_rows(torch.rand, shape, generator, embed.device)
        return self.rssm.filter(latent, embed, row.prev_action, row.is_first, uniform)

    def observe(
        self,
        batch: Timestep,
        uniform: Tensor | None = None,
        embed: Tensor | None = None,
        start: Latent | None = None,
    ) -> tuple[Latent, Tensor]:
        """Posterior latents (B, T, ...) and logits (B, T, S, C) of sequences (B, T).

        Args:
            uniform: (B, T, S) in [0, 1); drawn when not given.
            embed: (B, T, X) of the observations, where it is known.
            start: (B) the states before the first rows; None: the initial state.
        """
        embed = self.encode(batch.obs) if embed is None else embed
        if uniform is None:
            uniform = torch.rand(*embed.shape[:2], self.config.stoch, device=embed.device)
        return self.rssm.observe(embed, batch.prev_action, batch.is_first, uniform, start)

    def draw_noise(
        self, n: int, horizon: int, generator: torch.Generator | None = None
    ) -> StepNoise:
        """The noise of ``horizon`` steps of ``n`` rollouts: member (H, N), uniform (H, N, S).

        One member moves a row for a whole rollout, so that a trajectory follows one hypothesis
        about the world, unless ``world.member_per`` is ``step``. Where M divides ``n``, the rows
        are dealt out in blocks; the caller shuffles them where their order has a meaning.
        """
        c, device = self.config, self.bins.device
        uniform = torch.rand(horizon, n, c.stoch, device=device, generator=generator)
        drawn = partial(torch.randint, c.members, device=device, generator=generator)
        if c.member_per == "step":
            return StepNoise(drawn((horizon, n)), uniform)
        if n % c.members == 0:
            return StepNoise(None, uniform)
        return StepNoise(drawn((1, n)).expand(horizon, n), uniform)

    def step(self, latent: Latent, action: Tensor, noise: StepNoise | None = None) -> Prediction:
        """Predict the result of one action: (N), (N, A) -> Prediction (N)."""
        return self._step(latent, action, noise, measure=True)

    def step_unmeasured(
        self, latent: Latent, action: Tensor, noise: StepNoise | None = None
    ) -> Prediction:
        """:meth:`step` without the uncertainty, which needs the evaluation of every member."""
        return self._step(latent, action, noise, measure=False)

    def _step(
        self, latent: Latent, action: Tensor, noise: StepNoise | None, measure: bool
    ) -> Prediction:
        if noise is None:
            noise = self.draw_noise(action.shape[0], 1).at(0)
        by_heads = measure and self.probes is None
        following, logits = self.rssm.imagine_step(latent, action, noise, all_members=by_heads)
        uncertainty = None
        if by_heads and logits is not None:
            # Pieces that stay in the cache take 138 instead of 161 ms for 1020 plans.
            pieces = logits.split(cached_rows(logits[:, 0].numel(), logits.device), 1)
            uncertainty = torch.cat(
                [self.disagreement(mixed_probs(x.float(), self.config.unimix)) for x in pieces]
            )
        elif measure and self.probes is not None:
            uncertainty = self.probes.uncertainty(self.features(latent), bound_action(action))
        reward, cont = self.outcome(self.features(following))
        return Prediction(following, reward, cont, uncertainty)

    def step_expected(
        self, latent: Latent, action: Tensor, noise: StepNoise | None = None
    ) -> Prediction:
        """:meth:`step` to the expected state: class probabilities, averaged over members.

        Samples of categorical states part at once, so that the returns of two actions differ mostly
        by luck. Expected states have no luck, and ``noise`` has no effect.
        """
        return self._step_expected(latent, action, measure=True)

    def step_expected_unmeasured(
        self, latent: Latent, action: Tensor, noise: StepNoise | None = None
    ) -> Prediction:
        """:meth:`step_expected` without the uncertainty, which takes an eighth of its time."""
        return self._step_expected(latent, action, measure=False)

    def _step_expected(self, latent: Latent, action: Tensor, measure: bool) -> Prediction:
        following, probs = self.rssm.expected_step(latent, action)
        uncertainty = None
        if measure and self.probes is None:
            uncertainty = self.disagreement(probs)
        elif measure and self.probes is not None:
            uncertainty = self.probes.uncertainty(self.features(latent), bound_action(action))
        reward, cont = self.outcome(self.features(following))
        return Prediction(following, reward, cont, uncertainty)

    def disagreement(self, probs: Tensor) -> Tensor:
        """The configured measure of the prior heads: (M, N, S, C) -> (N,)."""
        return MEASURES[self.config.uncertainty](probs)

    def outcome(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Expected reward (...), and probability that the episode continues (...), of (..., F)."""
        reward = TwoHot(self.reward(features), self.bins).mean()
        return reward, torch.sigmoid(self.cont(features).float()).squeeze(-1)

    def decode(self, latent: Latent) -> dict[str, Tensor]:
        """Latents (N) -> {name: (N, *shape)}: images in [0, 1], vectors in symlog units."""
        decoded = self._decode(self.features(latent))
        images = {
            name: x.denormalize(decoded[name]).clamp(0, 1)
            for name, x in self.image_normalizers.items()
        }
        vectors = {
            name: x.denormalize(decoded[name]) for name, x in self.vector_normalizers.items()
        }
        return decoded | images | vectors

    def _decode(self, features: Tensor) -> dict[str, Tensor]:
        """Decode features; images and vectors are normalized as :meth:`prepare` does."""
        with self.autocast():
            return self.decoder(features)

    # --- learning ---------------------------------------------------------------------------

    def loss(self, batch: Timestep, episode: Tensor, start: Latent | None = None) -> WorldLoss:
        """The losses of the model on a batch, its posterior states, and metrics.

        Args:
            batch: (B, T) rows.
            episode: (B, T) int64, which episode each row belongs to (for the bootstrap).
            start: (B) the states before the first rows; None: the initial state.
        """
        obs = self.prepare(batch.obs)
        embed = self._encode(obs)
        latent, logits = self.observe(batch, embed=embed, start=start)
        flat = latent.map(lambda x: rearrange(x, "b t ... -> (b t) ..."))
        owned = lambda members: bootstrap_mask(episode, members, self.config.bootstrap)  # noqa: E731
        mask = rearrange(owned(self.config.members), "m b t -> m (b t)")
        features = self.features(flat)
        logits = rearrange(logits, "b t s c -> (b t) s c")
        terms, metrics, uncertainty = self._divergence(flat.deter, logits, mask)
        obs = {name: rearrange(x, "b t ... -> (b t) ...") for name, x in obs.items()}
        terms.update(self._reconstruction(features, obs))
        if self.barlow is not None:
            target = rearrange(embed, "b t x -> (b t) x")
            with self.autocast():
                terms["barlow"] = self.config.barlow_scale * self.barlow(features, target)
        reward, alive = batch.reward.flatten(), ~batch.is_terminal.flatten()
        terms.update(self._outcome_losses(features, reward, alive))
        if self.probes is not None:
            owners = owned(self.config.probe_members)
            terms["probes"], uncertainty = self._probe_loss(self.probes, latent, batch, owners)
        assert uncertainty is not None  # either the prior heads or the probes measure it
        high = torch.nanquantile(gather_rows(uncertainty), 0.95)
        metrics |= {
            "train/model/uncertainty": uncertainty.nanmean(),
            "train/model/uncertainty_high": high,
        }
        return WorldLoss(terms, latent, high, metrics)

    def fit_normalizers(self, obs: dict[str, Tensor]) -> None:
        """Update the statistics of images, in the first batches, and of vectors, always."""
        for name, images in self.image_normalizers.items():
            images.fit(obs[name])
        for name, vectors in self.vector_normalizers.items():
            vectors.fit(obs[name])

    def count_update(self) -> None:
        """Count an update of the weights, for the annealing of samples."""
        self.rssm.updates += 1

    def _reconstruction(self, features: Tensor, obs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The reconstruction losses () of rows (N), by name.

        Errors are summed over pixels (in [0, 1]) or over standardized entries. With another
        representation the decoder is a probe, which does not change the states.

        Args:
            obs: prepared observations.
        """
        fraction = self.config.decode_fraction
        if self.barlow is not None:
            features = features.detach()
        if fraction < 1.0:
            n = features.shape[0]
            chosen = torch.randperm(n, device=features.device)[: max(1, round(fraction * n))]
            features, obs = features[chosen], {name: x[chosen] for name, x in obs.items()}
        errors = self._errors(features, obs)
        return {name: self.config.recon_scale * error.mean() for name, error in errors.items()}

    def _errors(self, features: Tensor, obs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The squared error of every row: {name: (N,)}."""
        return {
            name: self.image_normalizers[name].squared_error(prediction, obs[name])
            if name in self.image_normalizers
            else (prediction - obs[name]).square().sum(-1)
            for name, prediction in self._decode(features).items()
        }

    def _outcome_losses(self, features: Tensor, reward: Tensor, alive: Tensor) -> dict[str, Tensor]:
        """The losses of the reward and continue heads on rows (N)."""
        with self.autocast():
            reward_logits, cont_logits = self.reward(features), self.cont(features)
        likelihood = TwoHot(reward_logits, self.bins).log_prob(reward)
        cont = bernoulli_log_prob(cont_logits.squeeze(-1), alive)
        return {"rew": -likelihood.mean(), "con": -cont.mean()}

    def _divergence(
        self, deter: Tensor, logits: Tensor, mask: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor | None]:
        """dyn = KL[sg q || p_m] over the members that own the row, rep = KL[q || sg p_m] over all.

        Where a row's KL is below the free nats, recurrent core and posterior get no gradient from
        it. The heads go on learning, since their disagreement would otherwise stay at the noise of
        their initialization. A hook on the heads' input does both with one evaluation.

        Returns:
            The terms, metrics, and the disagreement of the heads (N,); None with probes.
        """
        c = self.config
        heads_input = deter.view_as(deter)
        q = mixed_probs(logits, c.unimix)
        p = mixed_probs(self.rssm.prior_logits(heads_input), c.unimix)
        log_q, log_p = q.log(), p.log()
        dyn = categorical_kl(q.detach(), log_q.detach(), log_p)  # (M, N)
        dyn = (dyn * mask).sum(0) / mask.sum(0).clamp(min=1)
        rep = categorical_kl(q, log_q, log_p.detach()).mean(0)
        if heads_input.requires_grad:
            above = (dyn > c.free_nats).to(deter.dtype).unsqueeze(-1)
            heads_input.register_hook(lambda grad: grad * above)
        terms = {
            "dyn": c.dyn_scale * dyn.mean(),
            "rep": c.rep_scale * rep.clamp(min=c.free_nats).mean(),
        }
        metrics = {
            "train/model/kl": rep.detach().mean(),
            "train/model/posterior_entropy": -(q * log_q).sum((-2, -1)).detach().mean(),
        }
        return terms, metrics, None if self.probes is not None else self.disagreement(p.detach())

    def _probe_loss(
        self, probes: Probes, latent: Latent, batch: Timestep, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The loss () of the probes, and their uncertainty (B * (T - 1),), NaN across episodes.

        Args:
            mask: (M, B, T) bool, the rows that each probe learns from.
        """
        features = self.features(latent)
        inside = ~batch.is_first[:, 1:]  # not across the boundary of an episode
        mask = mask[:, :, 1:] & inside
        loss, uncertainty = probes.loss(
            rearrange(features[:, :-1], "b t f -> (b t) f"),
            rearrange(batch.prev_action[:, 1:], "b t a -> (b t) a"),
            rearrange(latent.stoch[:, 1:], "b t s c -> (b t) (s c)"),
            rearrange(mask, "m b t -> m (b t)"),
        )
        return loss, uncertainty.masked_fill(~inside.flatten(), torch.nan)
