"""Full updates of several configurations, timed in turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from latentplan.bench.parts import Part, random_rows, settle, summary, time_parts
from latentplan.config.loading import load
from latentplan.envs import make_train_env, pick_renderer
from latentplan.runtime.allocator import configure_malloc
from latentplan.runtime.device import pick_device
from latentplan.training.compiling import make_agent


def time_updates(
    settings: Mapping[str, Sequence[str]], repeats: int
) -> dict[str, dict[str, float]]:
    """Seconds (median, min, max) of a full update of every name's overrides, on random data.

    Task, device and threads are those of the first.

    Raises:
        UserError: a wrong key or value, an unknown preset, no working renderer.
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
        settle(agent)
        rows = random_rows(spec, config.train.batch, config.train.length, device)
        parts[name] = Part(lambda agent=agent, rows=rows: agent.update(*rows), lambda: None)
    return {name: summary(times) for name, times in time_parts(parts, repeats, device).items()}
