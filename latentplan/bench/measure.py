"""``latentplan bench``: the time of an update by its parts, and of the environment.

Repetitions are interleaved (all parts once, then all again), because the speed of a machine drifts.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import torch

from latentplan.agent import Agent
from latentplan.bench.loop import loop_cost
from latentplan.bench.parts import FULL, UpdateParts, random_rows, summary, time_parts
from latentplan.bench.planning import planning_cost
from latentplan.bench.storage import storage_cost
from latentplan.config.schema import Config
from latentplan.envs import VectorEnv, make_train_env, pick_renderer
from latentplan.envs.rendering import BACKENDS, probe
from latentplan.runs.provenance import commit, processor
from latentplan.runtime import cores
from latentplan.runtime.allocator import configure_malloc
from latentplan.runtime.clock import memory
from latentplan.runtime.device import pick_device
from latentplan.training.compiling import make_agent

log = logging.getLogger("latentplan")


def bench(
    config: Config,
    *,
    repeats: int = 7,
    env_seconds: float = 5.0,
    planning: bool = False,
    loop_seconds: float = 0.0,
) -> dict[str, Any]:
    """Time an agent of this configuration on random data, and the environment of its task.

    Args:
        config: the configuration of the agent and its environment.
        repeats: interleaved repetitions of every part of an update.
        env_seconds: seconds of acting in the environment.
        planning: also time updates and actions with and without the planner.
        loop_seconds: also train for this many seconds; 0: do not.

    Returns:
        Plain values for :func:`latentplan.bench.report.describe` and
        :func:`latentplan.bench.report.write_json`.

    Raises:
        UserError: there is no working renderer or device, or the loop made no update.
    """
    load_before = cores.in_use()
    torch.set_num_threads(config.train.threads or torch.get_num_threads())
    malloc = configure_malloc()
    device = pick_device(config.device)
    renderer = pick_renderer(config)
    with make_train_env(config, renderer) as env:
        agent, compiled = make_agent(config, env.spec, device)
        frames = time_environment(agent, env, env_seconds)
    log.info("timing updates of %s weights", f"{sum(p.numel() for p in agent.parameters()):,}")
    batch, episode = random_rows(env.spec, config.train.batch, config.train.length, device)
    seconds = time_parts(UpdateParts(agent, batch, episode).parts(), repeats, device)
    parts = {name: summary(times) for name, times in seconds.items()}
    full = parts.pop(FULL)
    extra: dict[str, Any] = {}
    if planning:
        extra["planning"] = planning_cost(config, env.spec, device, repeats)
    if loop_seconds:
        extra["loop"] = loop_cost(config, loop_seconds)
    return {
        "name": f"size {config.size}",
        "widths": _widths(config),
        "precision": "bfloat16 where it is faster" if agent.world.use_bfloat16 else "float32",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "compiled": compiled,
        "torch": torch.__version__,
        "commit": commit(),
        "processor": processor(),
        "load_before": load_before,
        "allocator_keeps_memory": malloc,
        "repeats": repeats,
        "parts": parts,
        "sum_of_parts": sum(part["median"] for part in parts.values()),
        "full": full,
        "environment": {
            "task": config.task,
            "renderer": f"{renderer.backend}, {renderer.quality}" if renderer else "none",
            **frames,
            "drawing": time_drawing(env_seconds) if renderer else {},
        },
        "storage": storage_cost(agent, env.spec, repeats),
        "rss_gib": memory()["memory/rss_gib"],
        **extra,
    }


# --- clocks ---------------------------------------------------------------------------------


def time_environment(agent: Agent, env: VectorEnv, seconds: float) -> dict[str, float]:
    """Act in the environment; return frames per second, and the time of policy and simulator."""
    row, _ = env.reset()
    carry = agent.initial(env.num_envs)
    frames = decisions = 0
    policy = simulation = 0.0
    warm_ups = 3
    while decisions == 0 or policy + simulation < seconds:
        begin = time.perf_counter()
        chosen, carry = agent.act(row.to(agent.device), carry)
        action = chosen.cpu().numpy()
        middle = time.perf_counter()
        row, used = env.step(action)
        if warm_ups:
            warm_ups -= 1
            continue
        policy += middle - begin
        simulation += time.perf_counter() - middle
        frames += int(used.sum())
        decisions += int((used > 0).sum())
    return {
        "frames_per_second": frames / (policy + simulation),
        "frames_per_second_without_policy": frames / simulation,
        "policy_seconds": policy / decisions,
        "simulation_seconds": simulation / decisions,
    }


def time_drawing(seconds: float) -> dict[str, dict[str, float]]:
    """Frames per second by backend, for those that work, and by quality.

    The qualities include the default of dm_control.
    """
    probes = [probe(backend, seconds / 5) for backend in BACKENDS]
    return {
        x.backend: {quality: 1 / each for quality, each in x.seconds.items()}
        for x in probes
        if x.works
    }


def _widths(config: Config) -> str:
    world, train = config.world, config.train
    return (
        f"deter {world.deter}, {world.stoch} x {world.classes} latents, depth {world.depth}, "
        f"{world.coder} coder, units {world.units}, {world.members} members, "
        f"{config.behavior.gradient} gradient; batch {train.batch} x {train.length}, "
        f"horizon {config.behavior.horizon}"
    )
