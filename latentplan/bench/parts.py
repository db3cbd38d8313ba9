"""The parts of an update, so that each can be timed alone.

Every part runs the update's own code. The other parts return recorded results.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from latentplan.agent import Agent, total
from latentplan.behavior.behavior import frozen
from latentplan.envs.actions import executed
from latentplan.types import EnvSpec, Latent, Rollout, Timestep

FULL = "full update"
WARM_UPS = 2


class Part(NamedTuple):
    """A function to time, and a function ``prepare`` that runs before it and is not timed."""

    run: Callable[[], object]
    prepare: Callable[[], object]


def recorded(module: object, **answers: object) -> Any:
    """A copy of an object whose named methods return recorded results. Weights are shared."""
    twin = copy.copy(module)
    for name, answer in answers.items():
        setattr(twin, name, lambda *_, _answer=answer, **__: _answer)
    return twin


class UpdateParts:
    """The parts of ``agent.update(batch, episode)``, each runnable alone, forward and backward."""

    def __init__(self, agent: Agent, batch: Timestep, episode: Tensor):
        self.agent, self.batch, self.episode = agent, batch, episode
        self.objective = agent.learner.objective
        end_first_updates(agent)
        agent.update(batch, episode)
        self.grads = [None if p.grad is None else p.grad.clone() for p in agent.parameters()]
        world = agent.world
        with torch.no_grad():
            embed = world.encode(batch.obs)
            latent, logits = world.observe(batch)
            flat = latent.map(lambda x: x.flatten(0, 1))
            self.latent = latent
            chosen = agent.learner.choose_starts(flat.deter.shape[0])
            self.start = flat.map(lambda x: x[chosen])
            imagined = self.objective.imagine(self.start)
            rollout = imagined[0]
        self.rows = {name: x.flatten(0, 1) for name, x in world.prepare(batch.obs).items()}
        self.features = world.features(flat).requires_grad_()
        inputs = [embed, logits, *(x.clone() for x in latent)]
        self.leaves = [self.features, *(x.requires_grad_() for x in inputs)]
        if self.objective.differentiable:
            self.leaves += [x.requires_grad_() for x in _outcome(rollout)]
        self.observer = recorded(world, encode=embed)
        observed = Latent(*inputs[2:]), logits
        self.heads_only = recorded(
            world, patchify=batch.obs, _encode=embed, observe=observed, _reconstruction={}
        )
        self.learner = copy.copy(agent.learner)
        self.learner.objective = recorded(self.objective, imagine=imagined)

    def parts(self) -> dict[str, Part]:
        """The parts in the order of an update, and the update itself at the end."""
        work = {
            "encoder": self.encoder,
            "observe": self.observe,
            "decoder": self.decoder,
            "heads": self.heads,
            "imagination": self.imagination,
            "actor-critic": self.actor_critic,
            "optimizer": self.optimizer,
            FULL: self.full,
        }
        return {
            name: Part(run, self.give_gradients if name == "optimizer" else self.clear)
            for name, run in work.items()
        }

    def clear(self) -> None:
        self.agent.zero_grad(set_to_none=True)
        for x in self.leaves:
            x.grad = None

    def give_gradients(self) -> None:
        for p, grad in zip(self.agent.parameters(), self.grads, strict=True):
            p.grad = None if grad is None else grad.clone()

    def encoder(self) -> None:
        _backward([self.agent.world.encode(self.batch.obs)])

    def observe(self) -> None:
        latent, logits = self.observer.observe(self.batch)
        _backward([*latent, logits])

    def decoder(self) -> None:
        total(self.agent.world._reconstruction(self.features, self.rows)).backward()

    def heads(self) -> None:
        total(self.heads_only.loss(self.batch, self.episode).terms).backward()

    def imagination(self) -> None:
        with frozen(self.agent.world), torch.set_grad_enabled(self.objective.differentiable):
            rollout, _ = self.objective.imagine(self.start)
        if self.objective.differentiable:
            _backward(_outcome(rollout))

    def actor_critic(self) -> None:
        losses, _ = self.learner.losses(self.latent, self.batch)
        total(losses).backward()

    def optimizer(self) -> None:
        self.agent.optimizer.step()
        self.agent.critic.follow()

    def full(self) -> None:
        self.agent.update(self.batch, self.episode)


def end_first_updates(agent: Agent) -> None:
    """Freeze the statistics of observations."""
    for images in agent.world.image_normalizers.values():
        images.freeze()
    for vectors in agent.world.vector_normalizers.values():
        vectors.freeze()


def _outcome(rollout: Rollout) -> list[Tensor]:
    """The tensors that a pathwise gradient passes through."""
    return [*rollout.latent, rollout.reward, rollout.cont]


def _backward(outputs: list[Tensor]) -> None:
    torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])


def summary(times: Sequence[float]) -> dict[str, float]:
    """Median, minimum and maximum of repetitions."""
    return {"median": statistics.median(times), "min": min(times), "max": max(times)}


def random_rows(
    spec: EnvSpec, batch: int, length: int, device: torch.device
) -> tuple[Timestep, Tensor]:
    """Random rows (B, T), one episode per sequence, and the numbers of the episodes (B, T)."""
    obs = {}
    for name, (shape, dtype) in spec.obs.items():
        size = (batch, length, *shape)
        image = dtype == "uint8"
        rows = torch.randint(256, size).byte() if image else torch.randn(size)
        obs[name] = rows.to(device)
    is_first = torch.zeros(batch, length, dtype=torch.bool, device=device)
    is_first[:, 0] = True
    keep = (~is_first).float()
    drawn = torch.rand(batch, length, spec.action_dim) * 2 - 1
    valid = executed(drawn.numpy(), spec.action_groups)
    action = torch.from_numpy(valid).to(device) * keep[..., None]
    reward = torch.rand(batch, length, device=device) * keep
    episode = torch.arange(batch, device=device)[:, None].expand(batch, length).contiguous()
    return Timestep(obs, action, reward, is_first, torch.zeros_like(is_first)), episode


def waiting_for(device: torch.device) -> Callable[[], None]:
    """A function that returns when the device has finished its work."""
    return partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None


def time_parts(
    parts: Mapping[str, Part], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of ``repeats`` interleaved repetitions of every part, after warm-ups."""
    wait = waiting_for(device)
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for repeat in range(WARM_UPS + repeats):
        for name, part in parts.items():
            part.prepare()
            wait()
            begin = time.perf_counter()
            part.run()
            wait()
            if repeat >= WARM_UPS:
                seconds[name].append(time.perf_counter() - begin)
    return seconds
