"""Tiny configurations, agents and batches that tests share."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from latentplan.config.loading import load, to_sealed_yaml
from latentplan.config.schema import BehaviorConfig, Config, OptimConfig, TrainConfig, WorldConfig
from latentplan.envs.actions import executed
from latentplan.types import EnvSpec, Timestep

# conftest.py imports this file. If it imported the agent, an error there would break all tests.
if TYPE_CHECKING:
    from latentplan.agent import Agent

VECTOR = EnvSpec({"vector": ((3,), "float32")}, 2, 2)
BOTH = EnvSpec({"image": ((16, 16, 3), "uint8"), "vector": ((3,), "float32")}, 2, 2)

DISCRETE = EnvSpec({"vector": ((3,), "float32")}, 5, 2, action_groups=(2, 3))

EPISODE = 64  # frames of an episode of the dummy task

WORLD = WorldConfig(
    deter=16,
    stoch=3,
    classes=4,
    hidden=8,
    blocks=2,
    units=8,
    vector_layers=2,
    depth=2,
    members=3,
    member_hidden=8,
    probe_members=3,
    probe_units=8,
    bins=41,
)
BEHAVIOR = BehaviorConfig(units=8, layers=1, bins=41, horizon=3)
OPTIM = OptimConfig(world_lr=1e-3, actor_lr=1e-3, critic_lr=1e-3, warmup=0)


# Overrides that make a benchmark take seconds.
BENCH_OVERRIDES = [
    *("task=dummy:pixels", "env.image_size=16", "env.workers=false", "train.precision=float32"),
    *("train.batch=2", "train.length=3", "behavior.horizon=2", "behavior.units=8"),
    *("behavior.bins=41", "world.bins=41", "world.deter=16", "world.stoch=3", "world.classes=4"),
    *("world.hidden=8", "world.units=8", "world.depth=2", "world.members=3"),
    *("world.member_hidden=8", "train.compile=off"),
]


def world_config(**changes: Any) -> WorldConfig:
    return replace(WORLD, **changes)


def agent_config(world: WorldConfig = WORLD, **behavior: Any) -> Config:
    return Config(
        world=world,
        behavior=replace(BEHAVIOR, **behavior),
        optim=OPTIM,
        train=TrainConfig(precision="float32"),
    )


def initialize_zero_heads(agent: Agent) -> None:
    """Initialize the zero-initialized heads at random."""
    for net in (agent.world.reward, agent.critic.net, agent.critic.slow_net):
        nn.init.normal_(net.output.weight, std=0.3)


@torch.no_grad()
def perturb(weights: Iterable[nn.Parameter], std: float) -> None:
    """Add normal noise to every weight, in place.

    Some heads are initialized at zero, where all predictions are equal.
    """
    for x in weights:
        x.add_(std * torch.randn_like(x))


@torch.no_grad()
def limit_two_hot_range(*heads: nn.Module) -> None:
    """Keep the predictions of perturbed two-hot heads to a few units.

    The outermost bins are at 5e8, so noise on their logits would dominate the mean.
    """
    for head in heads:
        head.output.bias.sub_(torch.linspace(-20, 20, len(head.output.bias)).square() / 2)


def random_batch(
    batch: int, length: int, spec: EnvSpec = VECTOR, seed: int = 0
) -> tuple[Timestep, torch.Tensor]:
    """Random rows (B, T) and their episode numbers (B, T).

    Each sequence is an episode of its own that begins in the sequence's first row.
    """
    rng = torch.Generator().manual_seed(seed)
    obs = {}
    for name, (shape, dtype) in spec.obs.items():
        if dtype == "uint8":
            obs[name] = torch.randint(256, (batch, length, *shape), generator=rng).byte()
        else:
            obs[name] = torch.randn(batch, length, *shape, generator=rng)
    action = torch.rand(batch, length, spec.action_dim, generator=rng) * 2 - 1
    is_first = torch.zeros(batch, length, dtype=torch.bool)
    is_first[:, 0] = True
    if spec.action_groups:
        action = torch.from_numpy(executed(action.numpy(), spec.action_groups))
    action[:, 0] = 0
    reward = torch.randn(batch, length, generator=rng)
    reward[:, 0] = 0
    episode = torch.arange(batch)[:, None].expand(batch, length).contiguous()
    return Timestep(obs, action, reward, is_first, torch.zeros_like(is_first)), episode


def select_rows(batch: Timestep, rows: slice | int) -> Timestep:
    """Rows of a batch (B, T) at a time or a slice of times: (B, ...) or (B, t, ...)."""
    return batch.map(lambda x: x[:, rows])


def run_config(folder: Path, *overrides: str) -> Config:
    """A run that takes seconds: a dummy task in this process and an agent with tiny widths."""
    items = [
        "size=tiny",
        "device=cpu",
        f"run_dir={folder}",
        "task=dummy:pixels",
        "obs=state",
        "env.workers=false",
        "env.repeat=4",
        "env.image_size=16",
        "world.deter=16",
        "world.depth=2",
        "world.bins=41",
        "behavior.bins=41",
        "behavior.horizon=3",
        "train.precision=float32",
        "train.threads=1",
        "train.batch=2",
        "train.length=8",
        "train.ratio=8",
        "train.prefill=20",
        "replay.capacity=1000",
        "steps=256",
        "log.every=64",
        "eval.every=128",
        "eval.episodes=1",
    ]
    return load([], [*items, *overrides])


def write_run(folder: Path, rows: Iterable[dict[str, Any]], *overrides: str) -> Path:
    """A run folder with a configuration and lines of metrics, without a checkpoint."""
    folder.mkdir(parents=True)
    config = load([], ["device=cpu", f"run_dir={folder}", *overrides])
    (folder / "config.yaml").write_text(to_sealed_yaml(config))
    lines = (json.dumps({"time": row["step"] / 10, **row}) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


def record_results(patch: pytest.MonkeyPatch, owner: object, name: str) -> list:
    """Patch ``owner.name`` so that the returned list collects the result of every call."""
    original, results = getattr(owner, name), []

    def call(*args: Any, **more: Any) -> Any:
        results.append(original(*args, **more))
        return results[-1]

    patch.setattr(owner, name, call)
    return results


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of nested dicts and lists, with its path."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        if isinstance(value, dict | list | tuple):
            yield from leaves(value, f"{path}/{key}")
        else:
            yield f"{path}/{key}", value


def differing_paths(one: Any, other: Any) -> list[str]:
    """The paths at which two trees of tensors and plain values are not the same, bit for bit."""
    a, b = dict(leaves(one)), dict(leaves(other))

    def same(path: str) -> bool:
        if isinstance(a[path], torch.Tensor):
            return torch.equal(a[path], b[path])
        return a[path] == b[path]

    return [
        path for path in a.keys() | b.keys() if path not in a.keys() & b.keys() or not same(path)
    ]
