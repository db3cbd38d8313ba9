"""What ablations cost: their full updates, in turns, against the first of them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import torch

from latentplan.agent import Agent
from latentplan.allocator import keep_memory
from latentplan.config import load
from latentplan.evaluate import make_train_env, pick_renderer
from latentplan.inspection.cost import Part, random_rows, time_parts
from latentplan.run_folder import pick_device


def ablation_cost(
    ablations: Sequence[str], overrides: Sequence[str], repeats: int
) -> dict[str, dict[str, float]]:
    """Seconds of a full update of every ablation, and its ratio to the first one's.

    Raises:
        UserError: an unknown ablation, a wrong key or value, no working renderer.
    """
    configs = {name: load(overrides=[*overrides, f"ablation={name}"]) for name in ablations}
    first = configs[ablations[0]]
    torch.set_num_threads(first.train.threads or torch.get_num_threads())
    keep_memory()
    device = pick_device(first.device)
    with make_train_env(first, pick_renderer(first)) as env:
        spec = env.spec
    batch, episode = random_rows(spec, first.train.batch, first.train.length, device)
    parts = {}
    for name, config in configs.items():
        torch.manual_seed(config.seed)
        agent = Agent(spec, config, device)
        parts[name] = Part(lambda agent=agent: agent.update(batch, episode), lambda: None)
    seconds = time_parts(parts, repeats, device)
    base = statistics.median(seconds[ablations[0]])
    return {
        name: {
            "median": statistics.median(times),
            "min": min(times),
            "max": max(times),
            "ratio": statistics.median(times) / base,
        }
        for name, times in seconds.items()
    }


def describe_ablations(cost: Mapping[str, Mapping[str, float]]) -> str:
    """A line for each."""
    first = next(iter(cost))
    lines = [f"full update, ms: median (min - max), times {first}"]
    for name, row in cost.items():
        low, middle, high = (1000 * row[key] for key in ("min", "median", "max"))
        lines.append(f"  {name:22} {middle:8.1f} ({low:.1f} - {high:.1f})  x {row['ratio']:.2f}")
    return "\n".join(lines)
