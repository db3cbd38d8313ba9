"""The time of full updates of several configurations, which run in turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch

from latentplan.bench.parts import Part, end_first_updates, random_rows, summary, time_parts
from latentplan.config.loading import load
from latentplan.envs import make_train_env, pick_renderer
from latentplan.runtime.allocator import configure_malloc
from latentplan.runtime.device import pick_device
from latentplan.training.compiling import make_agent


def time_updates(
    settings: Mapping[str, Sequence[str]], repeats: int
) -> dict[str, dict[str, float]]:
    """Seconds (median, min, max) of a full update on random data, by name.

    Args:
        settings: overrides by name. Task, device and threads are those of the first.

    Raises:
        UserError: a key, a value or a preset is wrong, or no renderer works.
    """
    configs = {name: load(overrides=list(overrides)) for name, overrides in settings.items()}
    first = next(iter(configs.values()))
    torch.set_num_threads(first.train.threads or torch.get_num_threads())
    configure_malloc()
    device = pick_device(first.device)
    with make_train_env(first, pick_renderer(first)) as env:
        spec = env.spec
    parts = {}
    for name, config in configs.items():
        agent, _ = make_agent(config, spec, device)
        end_first_updates(agent)
        rows = random_rows(spec, config.train.batch, config.train.length, device)
        parts[name] = Part(partial(agent.update, *rows), lambda: None)
    return {name: summary(times) for name, times in time_parts(parts, repeats, device).items()}


def ablation_cost(
    ablations: Sequence[str], overrides: Sequence[str], repeats: int
) -> dict[str, dict[str, float]]:
    """Seconds of a full update of every ablation, and its ratio to the first one.

    Raises:
        UserError: a key, a value or an ablation is wrong, or no renderer works.
    """
    settings = {name: [*overrides, f"ablation={name}"] for name in ablations}
    seconds = time_updates(settings, repeats)
    base = seconds[ablations[0]]["median"]
    return {name: {**row, "ratio": row["median"] / base} for name, row in seconds.items()}


def describe_ablations(cost: Mapping[str, Mapping[str, float]]) -> str:
    """One line of text per ablation."""
    first = next(iter(cost))
    lines = [f"full update, ms: median (min - max), times {first}"]
    for name, row in cost.items():
        low, middle, high = (1000 * row[key] for key in ("min", "median", "max"))
        lines.append(f"  {name:22} {middle:8.1f} ({low:.1f} - {high:.1f})  x {row['ratio']:.2f}")
    return "\n".join(lines)
