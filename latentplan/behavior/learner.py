"""What actor and critic learn from imagined rollouts: which losses, on which rows."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from latentplan.behavior.behavior import Behavior, frozen
from latentplan.behavior.conservative import learn_from_plans
from latentplan.behavior.losses import (
    Planned,
    critic_loss,
    distillation_loss,
    make_target,
    replay_returns,
)
from latentplan.behavior.objective import Dream, Objective
from latentplan.behavior.planner import plan_metrics
from latentplan.behavior.returns import trust
from latentplan.nn.action_distributions import PolicyDist
from latentplan.types import Latent, PlanTarget, Timestep


class Learner:
    """The losses of actor and critic. The weights are the agent's."""

    def __init__(self, behavior: Behavior, objective: Objective):
        self.behavior, self.objective, self.config = behavior, objective, behavior.config

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
        target, slow = dream.target, dream.slow[:, :, :-1]
        b.return_scale.update(target.returns.detach())
        with b.world.autocast():
            planned = self._learn_from_plans(dream)
            # A soft value is the policy's own: the critic learns nothing from planned rows.
            valued = (
                planned.own if planned and self.objective.soft else torch.ones_like(target.returns)
            )
            critic, baseline = self._value_loss(
                dream.features.detach(), target.returns, target.weight * valued, slow
            )
        actor = self.objective.actor_loss(dream, planned, baseline)
        losses = {"value": critic, "policy": actor.loss}
        metrics = actor.metrics
        if self.config.plan.search == "cross_entropy":
            taught, more = self._teach(dream, start, latent, batch)
            losses, metrics = losses | taught, metrics | more
        elif dream.acting or self.config.distill.weight:
            distilled, metrics["train/plan/distance"] = self._distill(dream, start, actor.weight)
            losses |= distilled
        if c.target_entropy is not None:
            losses["temperature"] = b.temperature.loss(dream.dist.entropy())
        if c.replay_scale:
            imagined = torch.where(
                valued[:, 0] > 0, target.returns[:, 0].detach(), dream.value[:, 0]
            )
            loss = self._replay_value_loss(latent, batch, chosen, imagined)
            losses["repval"] = c.replay_scale * loss
        return losses, metrics | self._metrics(dream, baseline)

    def choose_starts(self, n: int) -> Tensor:
        """The rows, of N, from which imagination starts: shuffled, and a multiple of M, since
        ensemble members are dealt out to blocks of rows."""
        members = self.config.world.members
        count = round(self.config.behavior.starts_fraction * n) // members * members
        device = self.behavior.return_scale.range.device
        return torch.randperm(n, device=device)[: max(members, count)]

    def _dream(self, start: Latent, alive: Tensor) -> Dream:
        """Imagine from N states; ``alive`` (N,) is 0 where an episode has ended."""
        c, b = self.config.behavior, self.behavior
        with frozen(b.world), torch.set_grad_enabled(self.objective.differentiable):
            rollout, acting = self.objective.imagine(start)
            features = b.world.features(rollout.latent)
            with b.world.autocast():
                slow = b.critic.slow_values(features)
        left = features[:, :-1]
        with b.world.autocast():
            dist = b.actor(left.detach())
        paid = rollout
        if self.objective.soft:
            paid = rollout._replace(reward=rollout.reward + self._entropy_reward(dist))
        value = slow.amin(0)
        target = make_target(paid, value[:, 1:], alive, c.discount, c.lam)
        if c.caution and rollout.uncertainty is not None:
            certain = trust(rollout.uncertainty / b.uncertainty_scale.value, c.caution)
            target = target._replace(weight=target.weight * certain)
        return Dream(rollout, acting, left, slow, value, dist, target)

    def _entropy_reward(self, dist: PolicyDist) -> Tensor:
        """(...) What the policy's entropy adds to rewards in a soft value."""
        scale, alpha = self.behavior.return_scale.value, self.behavior.temperature.value
        return scale * alpha * dist.entropy().detach()

    def _learn_from_plans(self, dream: Dream) -> Planned | None:
        if dream.acting is None:
            return None
        return learn_from_plans(
            dream.acting,
            dream.dist,
            self.behavior.value,
            self.behavior.return_scale.value,
            self.config.behavior.discount,
            self.objective.candidate_lam,
        )

    def replans_due(self) -> bool:
        """Whether replayed states are planned for in this update."""
        c = self.config.distill
        # The scale counts updates, also over sessions, so that a resumed run plans when it would
        # have planned.
        due = int(self.behavior.return_scale.count) % c.every == 0
        return bool(c.weight and c.states) and due

    def _teach(
        self, dream: Dream, start: Latent, latent: Latent, batch: Timestep
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The loss ``distill``, where there are plans, which moves the policy towards them.

        The plans are those that chose the replayed actions of the batch (B, T), if they are stored,
        and new ones for some of the N states of ``start``. Their losses are added.
        """
        losses, metrics = [], {}
        if batch.prev_plan is not None:
            # The row after a state has the plan that was made there.
            features = self.behavior.world.features(latent.map(lambda x: x[:, :-1]))
            plan = PlanTarget(*(x[:, 1:] for x in batch.prev_plan))
            loss, distance = self._plan_loss(features, plan)
            losses.append(loss)
            metrics["train/plan/stored_distance"] = distance
            metrics["train/plan/stored_gain"] = plan.gain.mean()
        if self.replans_due():
            rows, rate = slice(self.config.distill.states), -self.config.plan.imagine_rate
            states = start.map(lambda x: x[rows])
            plans = self.behavior.plan(states, rate)
            assert plans.refined is not None
            if rate:
                self.behavior.bonus_scale.update(plans.refined.spreads)
                self.behavior.bonus_scale.average_over_ranks()
            loss, distance = self._plan_loss(dream.features[rows, 0], plans.refined.target)
            losses.append(loss)
            metrics |= plan_metrics("teach", [plans], rate)
            metrics["train/plan/teach_gain"] = plans.refined.target.gain.mean()
            metrics["train/plan/distance"] = distance
        return ({"distill": torch.stack(losses).sum()} if losses else {}), metrics

    def _plan_loss(self, features: Tensor, plan: PlanTarget) -> tuple[Tensor, Tensor]:
        """The divergence () of the policy from plans (...), where a plan's score is above that of
        the policy's mode, and its mean () over all of them, for the log.

        Args:
            features: (..., F) of the states that were planned for.
        """
        # The policy is evaluated again, because its own loss frees the graph of the rollout.
        dist = self.behavior.actor(features.detach())
        std = plan.std.clamp(min=self.config.behavior.std_min)
        divergence = dist.divergence(plan.mean, std)
        useful = (plan.gain > 0).float()
        return (useful * divergence).mean(), divergence.detach().mean()

    def _distill(
        self, dream: Dream, start: Latent, weight: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The distillation loss, where it has a weight, and the policy's distance to the plans.

        Plans are those of the conservative imagination where there are any, else of the starts.
        The distance is in nats: how much less likely the chosen action is than a sample. With a
        ``distill.weight`` of 1 a planned state counts as much as any state of the same ``weight``
        (N, H) does in the actor's own loss.
        """
        dist, acting = dream.dist, dream.acting
        if acting is None:
            rows = torch.arange(weight.shape[0], device=weight.device)
            plans = [(0, self.behavior.plan(start, -self.config.plan.imagine_rate))]
        else:
            rows, plans = acting.rows, acting.plans
        rows, at = rows[:, None], torch.tensor([h for h, _ in plans], device=weight.device)
        there = dist.map(lambda x: x[rows, at])
        stacked = lambda part: torch.stack([part(x) for _, x in plans], 1)  # noqa: E731
        chosen = stacked(lambda x: x.action)
        distance = -(there.log_prob(chosen) + there.entropy()).mean().detach()
        if not self.config.distill.weight:
            return {}, distance
        action = stacked(lambda x: x.candidates.choice.action[:, :, 0])
        score = stacked(lambda x: x.score)
        loss = distillation_loss(there, action, score, self.config.distill.temperature)
        states = weight.shape[0] * self.objective.states_per_rollout
        loss = self.config.distill.weight * (weight[rows, at] * loss).sum() / states
        return {"distill": loss}, distance

    def _replay_value_loss(
        self, latent: Latent, batch: Timestep, chosen: Tensor, imagined: Tensor
    ) -> Tensor:
        """The critic's loss () on replayed rows, which ground it in real rewards.

        Rows are valued by what was imagined from them (DreamerV3's replay value).
        """
        c, b = self.config.behavior, self.behavior
        features = b.world.features(latent)
        reward = batch.reward
        with torch.no_grad():
            slow = b.critic.slow_values(features)
            value = slow.amin(0)
            bootstrap = value.flatten().index_copy(0, chosen, imagined).view_as(value)
            if self.objective.soft:
                reward = reward.clone()
                reward[:, 1:] += self._entropy_reward(b.actor(features[:, :-1]))
        returns, weight = replay_returns(reward, bootstrap, batch.is_first, batch.is_terminal, c)
        return self._value_loss(features[:, :-1], returns, weight, slow[:, :, :-1])[0]

    def _value_loss(
        self, features: Tensor, returns: Tensor, weight: Tensor, slow: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The critic's loss () and its values (...)."""
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
            "train/critic/return_scale": b.return_scale.value,
            "imagination/reward": dream.rollout.reward.mean().detach(),
            "imagination/cont": dream.rollout.cont.mean().detach(),
        }
        if dream.acting is not None:
            plans = [plan for _, plan in dream.acting.plans]
            metrics |= plan_metrics("imagine", plans, -self.config.plan.imagine_rate)
        return metrics
