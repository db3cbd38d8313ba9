"""The agent: act, explore, update. It owns the networks and the optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from latentplan.behavior.behavior import Behavior
from latentplan.behavior.dreamer import DreamerObjective
from latentplan.behavior.learner import Learner
from latentplan.behavior.mpdp import PerStepMpdp, SharedMpdp
from latentplan.behavior.networks import Actor, Critic, Temperature
from latentplan.behavior.planner import Plan, plan_metrics
from latentplan.behavior.returns import BonusScale, ReturnScale, UncertaintyScale
from latentplan.config.schema import Config
from latentplan.nn.action_distributions import perturbed
from latentplan.nn.distributed import average_over_ranks
from latentplan.nn.optimizer import LaProp
from latentplan.nn.random import Generators, draw_rows
from latentplan.types import EnvSpec, Latent, PlanTarget, Timestep, UserError
from latentplan.world.model import WorldModel


class NonFiniteLossError(RuntimeError):
    """A loss or gradient is NaN or infinite. The weights have not changed."""


def use_bfloat16(precision: str, device: torch.device) -> bool:
    """Whether large products run in bfloat16; ``auto``: where the hardware multiplies it."""
    if precision != "auto":
        return precision == "bfloat16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # With either unit, updates take as long as in float32 or less (docs/performance.md).
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def total(terms: Mapping[str, Tensor]) -> Tensor:
    """The sum () of loss terms."""
    return cast(Tensor, sum(terms.values()))


def choose_objective(config: Config) -> type[DreamerObjective | SharedMpdp | PerStepMpdp]:
    """The objective of the actor, by ``behavior.improvement`` and ``mpdp.policies``."""
    if config.behavior.improvement == "dreamer":
        return DreamerObjective
    return PerStepMpdp if config.mpdp.policies == "per_step" else SharedMpdp


def with_gradient(config: Config, spec: EnvSpec) -> Config:
    """The configuration with the estimator that ``behavior.gradient=auto`` stands for.

    Raises:
        UserError: the target of the entropy does not suit discrete actions.
    """
    behavior = config.behavior
    target = behavior.target_entropy
    if spec.action_groups and target is not None and not 0 < target < 1:
        raise UserError(
            "behavior.target_entropy must be between 0 and 1 for discrete actions, a fraction of "
            f"their largest entropy, not {target:g}."
        )
    if behavior.gradient != "auto":
        return config
    gradient = "reinforce" if spec.action_groups else "pathwise"
    return replace(config, behavior=replace(behavior, gradient=gradient))


class Agent(nn.Module):
    """A Dreamer agent with an ensemble of dynamics heads.

    ``world`` may be any model with the following attributes and methods of :class:`WorldModel`:
    ``spec``, ``feature_size``, initial, filter, observe, features, step, step_unmeasured,
    step_expected, step_expected_unmeasured, draw_noise, autocast, fit_normalizers, loss,
    count_update.
    ``config.world.members`` must be the number of its ensemble members.
    ``tests/behavior/test_plug_and_play.py`` has another model.

    The state of an environment (``carry``) is an argument and a return value, so that any number of
    environments and evaluations share one agent.
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
        self.config = config = with_gradient(config, spec)
        self.world = world or WorldModel(
            spec, config.world, bfloat16=use_bfloat16(config.train.precision, device)
        )
        features, norm = self.world.feature_size, config.world.norm
        objective = choose_objective(config)
        policies = objective.num_policies(config)
        self.actor = Actor(
            features, spec.action_dim, config.behavior, norm, policies, spec.action_groups
        )
        self.critic = Critic(features, config.behavior, norm)
        self.return_scale = ReturnScale(config.behavior.scale_rate)
        self.uncertainty_scale = UncertaintyScale(
            config.behavior.scale_rate, 2 * config.optim.warmup
        )
        self.bonus_scale = BonusScale(config.behavior.scale_rate)
        target = config.behavior.target_entropy
        self.temperature = Temperature(
            objective.entropy_bonus(config),
            None if target is None else target * self.actor.entropy_unit,
        )
        self.to(device)
        self.behavior = Behavior(
            self.world,
            self.actor,
            self.critic,
            self.return_scale,
            self.uncertainty_scale,
            self.bonus_scale,
            self.temperature,
            config,
        )
        self.learner = Learner(self.behavior, objective(self.behavior))
        o = config.optim
        self.optimizer = LaProp(
            [
                {"params": list(module.parameters()), "lr": lr}
                for module, lr in (
                    (self.world, o.world_lr),
                    (self.actor, o.actor_lr),
                    (self.critic.net, o.critic_lr),
                    (self.temperature, o.temperature_lr),
                )
                if list(module.parameters())  # a fixed temperature has none
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
        """The carry of ``n`` environments, before their first row."""
        return self.world.initial(n)

    @torch.no_grad()
    def act(
        self,
        row: Timestep,
        carry: Latent,
        mode: str = "sample",
        generator: Generators = None,
    ) -> tuple[Tensor, Latent]:
        """Choose actions for one row of N environments.

        Args:
            row: (N, ...) tensors on the agent's device.
            carry: from :meth:`initial` or the previous call.
            mode: ``mean`` or ``sample`` of the policy, or ``planner``.
            generator: random generator of all samples, or one per environment, with which the
                actions of an environment do not depend on the others; default the global one.

        Returns:
            Actions (N, A) in [-1, 1] and the new carry.
        """
        latent = self.world.filter(row, carry, generator=generator)
        if mode == "planner":
            return self._plan(latent, self.config.plan.act_rate, generator)[0], latent
        dist = self.behavior.policy(latent)
        if mode == "mean":
            return dist.mode, latent
        noise = draw_rows(torch.randn, dist.mean.shape, generator, self.device)
        return dist.rsample(noise).clamp(-1, 1), latent

    @torch.no_grad()
    def explore(
        self, row: Timestep, carry: Latent
    ) -> tuple[Tensor, Latent, PlanTarget | None, dict[str, Tensor]]:
        """Choose actions for training: plan optimistically, or follow the policy without a planner.

        ``behavior.explore_noise`` is added to planned actions and to those of the policy's mean. Of
        discrete actions, it is the probability that a choice is random.

        Returns:
            Actions (N, A), the new carry, the plans (N) if a search has made them, and metrics.
        """
        c, behavior, metrics, target = self.config.plan, self.config.behavior, {}, None
        if c.explore and c.candidates > 1:
            latent = self.world.filter(row, carry)
            action, target, plan = self._plan(latent, c.explore_rate)
            metrics = plan_metrics("explore", [plan], c.explore_rate)
            if c.explore_rate and plan.refined is not None:
                self.bonus_scale.update(plan.refined.spreads)
        else:
            action, latent = self.act(row, carry, behavior.explore)
            if behavior.explore == "sample":
                return action, latent, None, metrics
        if behavior.explore_noise:
            action = perturbed(action, behavior.explore_noise, self.actor.groups)
        return action.clamp(-1, 1), latent, target, metrics

    def _plan(
        self, latent: Latent, optimism: float, generator: Generators = None
    ) -> tuple[Tensor, PlanTarget | None, Plan]:
        """Plan for N environments.

        Ensemble members are dealt out to blocks of rows. Without a shuffle an environment would
        always be planned for by the same member. With a generator per environment, every row draws
        its member, and the order stays.

        Returns:
            The actions (N, A), what a search has found (N), and the plan, whose rows are shuffled.
        """
        n = latent.deter.shape[0]
        if isinstance(generator, Sequence):
            order = torch.arange(n, device=self.device)
        else:
            order = torch.randperm(n, device=self.device, generator=generator)
        plan = self.behavior.plan(latent.map(lambda x: x[order]), optimism, generator)
        back, target = order.argsort(), None
        if plan.refined is not None:
            target = PlanTarget(*(x[back] for x in plan.refined.target))
        return plan.action.clamp(-1, 1)[back], target, plan

    # --- learning ---------------------------------------------------------------------------

    def update(
        self,
        batch: Timestep,
        episode: Tensor,
        interruptible: AbstractContextManager[None] | None = None,
    ) -> dict[str, Tensor]:
        """One gradient step of world model, actor and critic.

        In a process group of ``torch.distributed``, every rank calls this with rows of its own, and
        all take the step of the joined batch (``docs/scaling.md``).

        Args:
            batch: (B, C + T) rows on the agent's device; the C of ``train.context`` come first,
                and only give the states before the others.
            episode: (B, C + T) int64.
            interruptible: entered while losses and gradients are computed. No weight changes there,
                and functions are compiled there.

        Returns:
            Metrics as detached tensors, so that the device is not waited for here. Losses are those
            of the joined batch, and all other metrics those of the rank's own rows.

        Raises:
            NonFiniteLossError: it names the terms. The weights have not changed.
        """
        self.bonus_scale.average_over_ranks()  # each rank has explored by itself
        history, context = None, self.config.train.context
        if context:
            history = batch.map(lambda x: x[:, :context])
            batch, episode = batch.map(lambda x: x[:, context:]), episode[:, context:]
        with interruptible or nullcontext():
            terms, high_uncertainty, metrics = self._differentiate(batch, episode, history)
        self.optimizer.step()
        self.world.fit_normalizers(batch.obs)
        self.world.count_update()
        self.critic.follow()
        self.uncertainty_scale.update(high_uncertainty)
        return {f"train/loss/{k}": v for k, v in terms.items()} | metrics

    def _differentiate(
        self, batch: Timestep, episode: Tensor, history: Timestep | None
    ) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]:
        """Compute the losses, and the gradients of all weights.

        Args:
            batch: (B, T) rows. episode: (B, T) int64.
            history: (B, C) the rows before them, if there are any.

        Returns:
            The losses by name, detached, the high uncertainty () of the batch, and metrics.

        Raises:
            NonFiniteLossError: as :meth:`update`. All ranks raise it together.
        """
        self.optimizer.zero_grad()
        start = None if history is None else self._end_of(history)
        terms, latent, high_uncertainty, seen = self.world.loss(batch, episode, start)
        total(terms).backward()
        behavior, metrics = self.learner.losses(latent.map(lambda x: x.detach()), batch)
        distill = behavior.get("distill") if self.config.plan.search == "cross_entropy" else None
        total({k: x for k, x in behavior.items() if x is not distill}).backward()
        pulls: Sequence[Tensor] = ()
        if distill is not None:
            learning = [p for p in self.actor.parameters() if p.grad is not None]
            pulls = torch.autograd.grad(distill, learning)
        terms = {k: x.detach() for k, x in (terms | behavior).items()}
        grads = [p.grad for p in self.parameters() if p.grad is not None]
        average_over_ranks([*grads, *pulls, *terms.values()])
        if pulls:
            metrics |= self._add_fraction(pulls)
        self._require_finite(terms)
        return terms, high_uncertainty, seen | metrics

    def _add_fraction(self, pulls: Sequence[Tensor]) -> dict[str, Tensor]:
        """Add the gradient of the distillation to the actor's, in a fixed ratio of their norms."""
        grads = [p.grad for p in self.actor.parameters() if p.grad is not None]
        own, pull = (torch.cat([x.flatten() for x in xs]) for xs in (grads, pulls))
        length = own.norm() / pull.norm().clamp(min=1e-12)
        for grad, x in zip(grads, pulls, strict=True):
            grad.add_(self.config.distill.weight * length * x)
        cosine = torch.nn.functional.cosine_similarity(own, pull, 0)
        return {"train/plan/teach_cosine": cosine}

    @torch.no_grad()
    def _end_of(self, context: Timestep) -> Latent:
        """The posterior states (B) after the last of the rows (B, C)."""
        return self.world.observe(context)[0].map(lambda x: x[:, -1])

    def _require_finite(self, terms: dict[str, Tensor]) -> None:
        """Check losses and gradients: a finite loss can have an infinite gradient."""
        grads = {n: p.grad for n, p in self.named_parameters() if p.grad is not None}
        norms = torch._foreach_norm(list(grads.values()))
        if torch.stack([*terms.values(), *norms]).isfinite().all():  # waits for the device, once
            return
        bad = [name for name, x in terms.items() if not x.isfinite()]
        if bad:
            raise NonFiniteLossError(f"The loss is not finite: {', '.join(bad)}.")
        bad = [name for name, x in grads.items() if not x.isfinite().all()]
        raise NonFiniteLossError(f"The gradient is not finite: {', '.join(bad[:5])}.")
