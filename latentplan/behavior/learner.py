"""What actor and critic learn from imagined rollouts: which losses, on which rows."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

from latentplan.behavior.behavior import Behavior, frozen
from latentplan.behavior.conservative import PlannedActing, learn_from_plans
from latentplan.behavior.losses import (
    Planned,
    Target,
    actor_loss,
    critic_loss,
    distillation_loss,
    make_target,
    replay_returns,
)
from latentplan.behavior.mpdp import (
    Improvement,
    improve,
    mpdp_metrics,
    roll_out,
)
from latentplan.behavior.planner import plan_metrics
from latentplan.nn.dists import ActionDist
from latentplan.types import Latent, Rollout, Timestep


class Dream(NamedTuple):
    """An imagined rollout and what is known of it before anything is learned."""

    rollout: Rollout  # (N, H)
    acting: PlannedActing | None  # who planned in it
    left: Tensor  # (N, H, F) features of the states left
    slow: Tensor  # (N, H+1) the slow critic's values
    dist: ActionDist  # (N, H) the policy at the states left, on detached features
    target: Target


class Learner:
    """The losses of actor and critic. It owns nothing."""

    def __init__(self, behavior: Behavior):
        self.behavior, self.config = behavior, behavior.config

    def losses(
        self, latent: Latent, batch: Timestep
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Losses, and metrics, from rollouts that start at replayed states (B, T)."""
        c, b = self.config.behavior, self.behavior
        flat = latent.map(lambda x: rearrange(x, "b t ... -> (b t) ..."))
        alive = rearrange((~batch.is_terminal).float(), "b t -> (b t)")
        chosen = self.choose_starts(alive.shape[0])
        start = flat.map(lambda x: x[chosen])
        dream = self._dream(start, alive[chosen])
        target, dist = dream.target, dream.dist
        b.scale.update(target.returns.detach())
        features, slow = dream.left.detach(), dream.slow[:, :-1]
        with b.world.autocast():
            planned = self._learn_from_plans(dream)
            # MPDP needs the policy's own value: of what a planner chose, the critic learns nothing.
            valued = planned.own if b.mpdp and planned else torch.ones_like(slow)
            critic, baseline = self._value_loss(
                features, target.returns, target.weight * valued, slow
            )
        losses = {"value": critic}
        metrics = {}
        reach = target.weight  # of the states that plans may teach
        if b.mpdp:
            losses["policy"], found = self._improve(dream, planned)
            metrics |= mpdp_metrics(found)
            if not b.apart:
                reach = reach * self._taken(found)
        else:
            scale, alpha = b.scale.value, b.temperature.value
            losses["policy"] = actor_loss(
                dist, dream.rollout, target, baseline, scale, alpha, c, planned
            )
        if dream.acting or self.config.distill.weight:
            distilled, metrics["train/plan/distance"] = self._distill(dream, start, reach)
            losses |= distilled
        if c.target_entropy is not None:
            losses["temperature"] = b.temperature.loss(dist.entropy())
        if c.replay_scale:
            imagined = torch.where(valued[:, 0] > 0, target.returns[:, 0].detach(), slow[:, 0])
            loss = self._replay_value_loss(latent, batch, chosen, imagined)
            losses["repval"] = c.replay_scale * loss
        return losses, metrics | self._metrics(dream, baseline)

    def choose_starts(self, n: int) -> Tensor:
        """Shuffled, since ensemble members are dealt out to blocks of rows; a multiple of M."""
        members = self.config.world.members
        count = round(self.config.behavior.starts_fraction * n) // members * members
        device = self.behavior.scale.range.device
        return torch.randperm(n, device=device)[: max(members, count)]

    def _dream(self, start: Latent, alive: Tensor) -> Dream:
        """Imagine from N states; ``alive`` (N,) is 0 where an episode has ended."""
        c, b = self.config.behavior, self.behavior
        grad = c.gradient == "pathwise" and not b.apart
        with frozen(b.world), torch.set_grad_enabled(grad):
            rollout, acting = b.imagine(start, c.horizon)
            features = b.world.features(rollout.latent)
            with b.world.autocast():
                slow = b.critic.slow_value(features)
        left = features[:, :-1]
        with b.world.autocast():
            dist = b.actor(left.detach())
        paid = rollout._replace(reward=rollout.reward + self._entropy_bonus(dist))
        target = make_target(paid, slow[:, 1:], alive, c.discount, c.lam)
        return Dream(rollout, acting, left, slow, dist, target)

    def _entropy_bonus(self, dist: ActionDist) -> Tensor | float:
        """What is paid for it beside rewards: with MPDP the critic learns the *soft* value."""
        b = self.behavior
        return b.scale.value * b.temperature.value * dist.entropy().detach() if b.mpdp else 0.0

    def _learn_from_plans(self, dream: Dream) -> Planned | None:
        if dream.acting is None:
            return None
        c, b, lam = self.config.behavior, self.behavior, None
        if c.gradient == "pathwise":
            lam = 0.0 if b.mpdp else c.lam  # an MPDP objective counts every action once
        return learn_from_plans(dream.acting, dream.dist, b.value, b.scale.value, c.discount, lam)

    def _improve(self, dream: Dream, planned: Planned | None) -> tuple[Tensor, Improvement]:
        """The MPDP loss at the starts of every window of a rollout, and what it is made of: from
        the rollout that there is or, where the policies are several, one of their own."""
        m, c, b = self.config.mpdp, self.config.behavior, self.behavior
        windows = partial(_windows, size=m.horizon, count=c.horizon // m.horizon)
        weight = windows(dream.target.weight)
        if b.apart:
            start = dream.rollout.latent.map(lambda x: windows(x[:, :-1])[:, 0])
            policy = partial(b.policy, attached=True)
            noise = b.world.draw_noise(weight.shape[0], m.horizon)
            with frozen(b.world), b.world.autocast():
                rollout, entropy = roll_out(b.step, policy, start, m.horizon, step_noise=noise)
                value = b.critic.slow_value(b.world.features(rollout.latent)[:, 1:])
        else:
            whole = dream.rollout
            doubt = whole.uncertainty
            rollout = whole._replace(
                reward=windows(whole.reward),
                cont=windows(whole.cont),
                uncertainty=doubt if doubt is None else windows(doubt),
            )
            value, left = windows(dream.slow[:, 1:]), windows(dream.left)
            # As in the rollout, where the gradient was cut.
            left = torch.cat([left[:, :1].detach(), left[:, 1:]], 1)
            with b.world.autocast():
                entropy = b.actor(left).entropy()
            if planned is not None:  # where a candidate is merely followed it is not climbed
                entropy = torch.where(windows(planned.learns) > 0, entropy, entropy.detach())
        found = improve(
            rollout,
            entropy,
            value,
            discount=c.discount,
            alpha=b.temperature.value,
            beta=m.beta,
            threshold=m.threshold if m.adaptive_horizon else None,
            reward_scale=b.scale.value,
            uncertainty_scale=b.novelty_scale.value,
            price=rollout.reward.detach().abs().mean(),
        )
        gain = weight[:, 0] * found.objective
        if planned is not None:
            gain = gain + (weight * found.taken * windows(planned.gain)).sum(1)
        return -gain.mean(), found

    def _taken(self, found: Improvement) -> Tensor:
        """(N, H) 1 for the steps of a rollout that its windows improve, before each one's cut."""
        horizon = self.config.behavior.horizon
        count = horizon // self.config.mpdp.horizon
        taken = rearrange(found.taken, "(n w) h -> n (w h)", w=count)
        return functional.pad(taken, (0, horizon - taken.shape[1]))

    def _distill(
        self, dream: Dream, start: Latent, weight: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The loss, where one is asked for, and how far the policy (N, H) is from the plans'
        choices, in nats: the likelihood of a fresh sample above that of the chosen action. Plans
        are those of the conservative imagination where there are any, else of the starts. With a
        ``distill.weight`` of 1 a planned state counts as much as any state of the same ``weight``
        (N, H) does in the policy's own loss."""
        dist, acting = dream.dist, dream.acting
        if acting is None:
            rows = torch.arange(weight.shape[0], device=weight.device)
            plans = [(0, self.behavior.plan(start, -self.config.plan.imagine_rate))]
        else:
            rows, plans = acting.rows, acting.plans
        rows, at = rows[:, None], torch.tensor([h for h, _ in plans], device=weight.device)
        there = ActionDist.of(dist.mean[rows, at], dist.std[rows, at])
        stacked = lambda part: torch.stack([part(x) for _, x in plans], 1)  # noqa: E731
        chosen = stacked(lambda x: x.action)
        distance = -(there.log_prob(chosen) + there.entropy()).mean().detach()
        if not self.config.distill.weight:
            return {}, distance
        action = stacked(lambda x: x.candidates.choice.action[:, :, 0])
        score = stacked(lambda x: x.score)
        loss = distillation_loss(there, action, score, self.config.distill.temperature)
        n, horizon = weight.shape
        states = n * (horizon // (self.config.mpdp.horizon if self.behavior.mpdp else 1))
        loss = self.config.distill.weight * (weight[rows, at] * loss).sum() / states
        return {"distill": loss}, distance

    def _replay_value_loss(
        self, latent: Latent, batch: Timestep, chosen: Tensor, imagined: Tensor
    ) -> Tensor:
        """Ground the critic in real rewards; rows are valued by what was imagined from them."""
        c, b = self.config.behavior, self.behavior
        features = b.world.features(latent)
        with torch.no_grad():
            slow = b.critic.slow_value(features)
            bootstrap = slow.flatten().index_copy(0, chosen, imagined).view_as(slow)
            bonus = self._entropy_bonus(b.actor(features[:, :-1])) if b.mpdp else 0.0
        reward = batch.reward.clone()
        reward[:, 1:] += bonus
        returns, weight = replay_returns(reward, bootstrap, batch.is_first, batch.is_terminal, c)
        return self._value_loss(features[:, :-1], returns, weight, slow[:, :-1])[0]

    def _value_loss(
        self, features: Tensor, returns: Tensor, weight: Tensor, slow: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The critic's, and what it says."""
        scale = self.config.behavior.slow_scale
        return critic_loss(self.behavior.critic, features, returns, weight, slow, scale)

    def _metrics(self, dream: Dream, baseline: Tensor) -> dict[str, Tensor]:
        b = self.behavior
        metrics = {
            "train/actor/entropy": dream.dist.entropy().mean().detach(),
            "train/actor/std": dream.dist.std.mean().detach(),
            "train/actor/temperature": b.temperature.value,
            "train/critic/value": baseline.mean(),
            "train/critic/return": dream.target.returns.mean().detach(),
            "train/critic/return_scale": b.scale.value,
            "imagination/reward": dream.rollout.reward.mean().detach(),
            "imagination/cont": dream.rollout.cont.mean().detach(),
        }
        if dream.acting is not None:
            plans = [found for _, found in dream.acting.plans]
            metrics |= plan_metrics("imagine", plans, -self.config.plan.imagine_rate)
        return metrics


def _windows(x: Tensor, size: int, count: int) -> Tensor:
    """The first ``count`` windows of a rollout, a row each: (N, T, ...) -> (N W, size, ...)."""
    return rearrange(x[:, : size * count], "n (w h) ... -> (n w) h ...", w=count)
