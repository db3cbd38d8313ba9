"""Two ranks that learn together, and one process that learns from the joined batch.

``tests/test_distributed.py`` compares them. The ranks are processes of their own that import this
file, so it does not import pytest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tiny import BOTH, agent_config, limit_two_hot_range, perturb, random_batch, world_config
from torch import Tensor, distributed

from latentplan.agent import Agent, NonFiniteLossError
from latentplan.behavior import behavior as behavior_module
from latentplan.behavior.behavior import Behavior
from latentplan.behavior.learner import Learner
from latentplan.behavior.returns import BonusScale
from latentplan.config.schema import Config, DistillConfig, MpdpConfig, PlanConfig
from latentplan.nn.distributed import gather_rows, mean_over_ranks
from latentplan.types import StepNoise, Timestep
from latentplan.world.model import WorldModel

RANKS = 2
UPDATES = 10
SHAPE = 6, 4  # sequences of a rank, and their rows


def configurations() -> dict[str, Config]:
    """Configurations by name, which together use everything that ranks tell each other."""
    base = agent_config(gradient="pathwise")
    return {
        "planner": replace(base, plan=PlanConfig(candidates=3, imagine_fraction=0.5)),
        "search": replace(
            base,
            plan=PlanConfig(search="cross_entropy", candidates=6, imagine_fraction=0.0, elites=2),
            distill=DistillConfig(weight=0.5, states=1000, every=2),
        ),
        "mpdp": replace(
            agent_config(improvement="mpdp", target_entropy=-1.0),
            mpdp=MpdpConfig(horizon=3, beta=0.5),
        ),
        "barlow": replace(base, world=world_config(representation="barlow", uncertainty="probes")),
    }


def batch_of(rank: int, update: int) -> tuple[Timestep, Tensor]:
    """The batch (B, T) of a rank. Ranks differ in their rewards and in their episodes, of which
    the probes learn from another number in each rank."""
    batch, episode = random_batch(*SHAPE, BOTH, seed=RANKS * update + rank)
    return batch._replace(reward=batch.reward * (1 + 4 * rank)), episode + 3 * SHAPE[0] * rank


def joined(update: int) -> tuple[Timestep, Tensor]:
    """The batches of all ranks as one."""
    parts = [batch_of(rank, update) for rank in range(RANKS)]
    first, second = (batch for batch, _ in parts)
    obs = {name: torch.cat([first.obs[name], second.obs[name]]) for name in first.obs}
    others = {
        name: torch.cat([getattr(first, name), getattr(second, name)])
        for name in ("prev_action", "reward", "is_first", "is_terminal")
    }
    return first._replace(obs=obs, **others), torch.cat([episode for _, episode in parts])


def new_agent(config: Config) -> Agent:
    """An agent whose heads predict something: where a gradient is zero but for rounding errors, the
    optimizer would make whole steps of them."""
    torch.manual_seed(0)
    agent = Agent(BOTH, config)
    heads = agent.world.reward, agent.critic.net, agent.critic.slow_net
    for head in heads:
        torch.manual_seed(0)  # the slow critic begins as a copy
        perturb(head.parameters(), 0.3)
    limit_two_hot_range(*heads)
    return agent


def learn(agent: Agent, batches: Callable[[int], tuple[Timestep, Tensor]]) -> dict[str, Any]:
    """Ten updates. Returns the metrics of each, and the state of the agent after them."""
    metrics = [agent.update(*batches(update)) for update in range(UPDATES)]
    return {"metrics": metrics, "state": deepcopy(agent.state_dict())}


def learn_as_rank(rank: int, folder: str) -> None:
    """The process of one rank. It writes what it has learned to ``folder``."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=RANKS)
    results = {}
    for name, config in configurations().items():
        agent = new_agent(config)
        torch.manual_seed(1 + rank)
        results[name] = learn(agent, lambda update: batch_of(rank, update))
    parts = exchange(rank) | {"refused": refuse(rank, agent)}
    torch.save((results, parts), Path(folder) / f"rank{rank}.pt")
    distributed.destroy_process_group()


def exchange(rank: int) -> dict[str, Any]:
    """What the functions of the module give a rank."""
    rows = torch.arange(4.0).view(2, 2) + 10 * rank
    rows.requires_grad_()
    gathered = gather_rows(rows)
    gathered.square().sum().backward()
    scale = BonusScale(0.5)
    scale.update(torch.tensor([1.0, 4.0]) * (1 + rank))
    scale.average_over_ranks()
    return {
        "mean": mean_over_ranks(torch.tensor(3 + rank)),
        "rows": gathered.detach(),
        "grad": rows.grad,
        "spreads": scale.spreads,
    }


def refuse(rank: int, agent: Agent) -> tuple[str, bool]:
    """An update in which one rank has a bad number: its error, and whether the weights stay."""
    batch, episode = batch_of(rank, 0)
    if rank == 1:
        batch.reward[1, 1] = torch.nan
    before = [x.clone() for x in agent.parameters()]
    error = ""
    try:
        agent.update(batch, episode)
    except NonFiniteLossError as caught:
        error = str(caught)
    pairs = zip(before, agent.parameters(), strict=True)
    return error, all(torch.equal(x, y) for x, y in pairs)


class Noise:
    """The random numbers of all ranks, in one process: each rank's from a generator of its own."""

    def __init__(self) -> None:
        self.states = [torch.manual_seed(1 + rank).get_state() for rank in range(RANKS)]

    def of_ranks(self, draw: Callable[[], Any]) -> list[Any]:
        """What ``draw`` gives each rank."""
        results = []
        for rank, state in enumerate(self.states):
            torch.set_rng_state(state)
            results.append(draw())
            self.states[rank] = torch.get_rng_state()
        return results


@contextmanager
def noise_of_ranks(agent: Agent) -> Iterator[None]:
    """Inside, rows that a rank would have get the noise that they get there."""
    noise, members = Noise(), agent.config.world.members
    rand, randn_like, draw_rows = torch.rand, torch.randn_like, behavior_module.draw_rows
    draw_noise, observe = WorldModel.draw_noise, WorldModel.observe

    def drawn_noise(world: WorldModel, n: int, horizon: int, generator: Any = None) -> StepNoise:
        def of_rank() -> tuple[Tensor, Tensor]:
            member, uniform = draw_noise(world, n // RANKS, horizon, generator)
            blocks = torch.arange(n // RANKS) * members // (n // RANKS)
            return blocks.expand(horizon, -1) if member is None else member, uniform

        parts = noise.of_ranks(of_rank)
        return StepNoise(*(torch.cat(x, 1) for x in zip(*parts, strict=True)))

    def observed(world: WorldModel, batch: Timestep, *, embed: Tensor, start: None) -> Any:
        rows, length = batch.reward.shape
        shape = rows // RANKS, length, world.config.stoch
        uniform = torch.cat(noise.of_ranks(lambda: rand(*shape)))
        return observe(world, batch, uniform, embed, start)

    def normal_like(x: Tensor) -> Tensor:
        return torch.cat(noise.of_ranks(lambda: randn_like(x[: len(x) // RANKS])))

    def rows(sample: Any, shape: Any, generator: Any, device: Any, axis: int = 0) -> Tensor:
        one = (*shape[:axis], shape[axis] // RANKS, *shape[axis + 1 :])
        parts = noise.of_ranks(lambda: draw_rows(sample, one, generator, device, axis))
        return torch.cat(parts, axis)

    def chosen(choose: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
        def choice(owner: Any, n: int) -> Tensor | None:
            parts = noise.of_ranks(lambda: choose(owner, n // RANKS))
            if parts[0] is None:
                return None
            return torch.cat([x + rank * (n // RANKS) for rank, x in enumerate(parts)])

        return choice

    with ExitStack() as patches:
        for owner, name, new in (
            (WorldModel, "draw_noise", drawn_noise),
            (WorldModel, "observe", observed),
            (torch, "randn_like", normal_like),
            (behavior_module, "draw_rows", rows),
            (Learner, "choose_starts", chosen(Learner.choose_starts)),
            (Behavior, "choose_planned", chosen(Behavior.choose_planned)),
        ):
            patches.enter_context(mock.patch.object(owner, name, new))
        yield
