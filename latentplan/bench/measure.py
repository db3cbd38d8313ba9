"""What one update costs and where the time goes: ``latentplan bench``.

Repetitions are interleaved (all parts once, then all again), because a machine drifts.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from latentplan.agent import Agent
from latentplan.bench.floor import floors, peak_rates
from latentplan.bench.loop import loop_cost
from latentplan.bench.parts import FULL, Part, UpdateParts, random_rows, summary, time_parts
from latentplan.bench.planning import planning_cost
from latentplan.bench.reference import Reference, Widths
from latentplan.config.loading import load
from latentplan.config.schema import Config
from latentplan.data.replay import Replay
from latentplan.envs import VectorEnv, make_train_env, pick_renderer
from latentplan.envs.rendering import BACKENDS, probe
from latentplan.runs.provenance import commit, processor
from latentplan.runtime import cores
from latentplan.runtime.allocator import configure_malloc
from latentplan.runtime.clock import memory
from latentplan.runtime.device import pick_device
from latentplan.training.compiling import make_agent
from latentplan.types import EnvSpec

log = logging.getLogger("latentplan")
ROWS = 2000  # of the replay that is sampled


class Peer(NamedTuple):
    """Another program at the same widths. Its numbers come from another run, never from here."""

    name: str
    overrides: list[str]
    seconds: float  # one full update, as reported
    kept_memory: float  # estimate for the same allocator settings as ours


def _same_work(deter: int, stoch: int, depth: int, units: int) -> list[str]:
    """A peer's widths, batch and horizon; every frame decoded, every row a start.

    The rest, how pictures are coded for one, is the CPU preset's.
    """
    values = {
        **{"size": "cpu", "obs": "pixels", "env.image_size": 64},
        **{"train.batch": 16, "train.length": 64, "behavior.horizon": 15},
        **{"behavior.starts_fraction": 1.0, "world.decode_fraction": 1.0},
        **{"world.layers": 2, "behavior.layers": 2, "world.deter": deter, "world.depth": depth},
        **{"world.stoch": stoch, "world.classes": stoch},
        **{f"world.{key}": units for key in ("hidden", "units", "member_hidden")},
        **{"behavior.units": units, "world.bins": 255, "behavior.bins": 255},
    }
    return [f"{key}={value}" for key, value in values.items()]


PLAIN = "plain reference"
# Allocator settings alone (latentplan/allocator.py) were seen to give 1.3 to 1.8x on a CPU.
PEERS = {
    "small": Peer("dreamerv3-torch, small", _same_work(128, 16, 16, 128), 2.4, 1.6),
    "large": Peer("dreamerv3-torch, large", _same_work(512, 32, 32, 512), 11.5, 11.5 / 1.45),
}


def bench(
    peers: Sequence[str] = tuple(PEERS),
    size: str | None = None,
    overrides: Sequence[str] = (),
    *,
    repeats: int = 7,
    env_seconds: float = 5.0,
    planning: bool = False,
    loop_seconds: float = 0.0,
) -> list[dict[str, Any]]:
    """Measure at the widths of ``peers`` or, where ``size`` is given, of that preset.

    Args:
        overrides: come last in either case.
        planning: also compare updates with and without it.
        loop_seconds: also train for so long.

    Returns:
        One result of plain values for each.

    Raises:
        UserError: a wrong key or value, an unknown preset, no working renderer.
    """
    if size is not None:
        config = load(overrides=[f"size={size}", *overrides])
        measured = measure(config, repeats, env_seconds, planning, loop_seconds)
        return [{"name": f"size {size}", **measured}]
    results = []
    for key in peers:
        peer = PEERS[key]
        config = load(overrides=[*peer.overrides, *overrides])
        measured = measure(config, repeats, env_seconds, planning, loop_seconds)
        result = {"name": f"widths of {peer.name}", **measured}
        results.append(result | {"peer": _compare(peer, result)})
    return results


def measure(
    config: Config,
    repeats: int,
    env_seconds: float,
    planning: bool = False,
    loop_seconds: float = 0.0,
) -> dict[str, Any]:
    """Time an agent of this configuration on random data, and its task's environment."""
    busy = cores.in_use()
    torch.set_num_threads(config.train.threads or torch.get_num_threads())
    kept = configure_malloc()
    device = pick_device(config.device)
    renderer = pick_renderer(config)
    with make_train_env(config, renderer) as env:
        agent, compiled = make_agent(config, env.spec, device)
        frames = time_environment(agent, env, env_seconds)
    log.info("timing updates of %s weights", f"{sum(p.numel() for p in agent.parameters()):,}")
    batch, episode = random_rows(env.spec, config.train.batch, config.train.length, device)
    work = UpdateParts(agent, batch, episode).parts()
    timed = dict(work)
    if env.spec.images:
        torch.manual_seed(config.seed)
        plain = Reference(
            Widths.from_config(config), config.env.image_size, env.spec.action_dim
        ).to(device)
        timed[PLAIN] = Part(lambda: plain.update(batch), lambda: None)
    seconds = time_parts(timed, repeats, device)
    parts = {name: summary(times) for name, times in seconds.items() if name in work}
    full = parts.pop(FULL)
    rates = peak_rates(device)
    extra: dict[str, Any] = {"peak_gflops": {k: x / 1e9 for k, x in rates.items()}}
    extra["floors"] = floors(work, seconds, rates)
    if PLAIN in seconds:
        reference = summary(seconds[PLAIN])
        extra["plain"] = {**reference, "ratio": full["median"] / reference["median"]}
    if planning:
        extra["planning"] = planning_cost(config, env.spec, device, repeats)
    if loop_seconds:
        extra["loop"] = loop_cost(config, loop_seconds)
    return {
        "widths": _widths(config),
        "precision": "bfloat16 where it pays" if agent.world.use_bfloat16 else "float32",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "compiled": compiled,
        "torch": torch.__version__,
        "commit": commit(),
        "processor": processor(),
        "load_before": busy,
        "allocator_keeps_memory": kept,
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
        "replay_seconds": time_replay(config, env.spec, repeats),
        "rss_gib": memory()["memory/rss_gib"],
        **extra,
    }


# --- clocks ---------------------------------------------------------------------------------


def time_environment(agent: Agent, env: VectorEnv, seconds: float) -> dict[str, float]:
    """Act in the environment, one after the other: frames/s, and where the time of each goes."""
    row, _ = env.reset()
    carry = agent.initial(env.num_envs)
    frames = decisions = 0
    policy = simulation = 0.0
    warm_ups = 3
    while decisions == 0 or policy + simulation < seconds:
        begin = time.perf_counter()
        action, carry = agent.act(row.to(agent.device), carry)
        action = action.cpu().numpy()
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
    """Frames/s of every backend that works here, by quality; dm_control's own way among them."""
    probes = [probe(backend, seconds / 5) for backend in BACKENDS]
    return {
        x.backend: {quality: 1 / each for quality, each in x.seconds.items()}
        for x in probes
        if x.works
    }


def time_replay(config: Config, spec: EnvSpec, repeats: int) -> dict[str, float]:
    """Seconds of one batch from a replay of ``ROWS`` rows that lies in the page cache."""
    batch, length = config.train.batch, config.train.length
    rng = np.random.default_rng(0)
    row = random_rows(spec, 1, 1, torch.device("cpu"))[0].map(lambda x: x[0].numpy())
    times = []
    with tempfile.TemporaryDirectory() as folder:
        replay = Replay(Path(folder), spec, capacity=max(ROWS, length), envs=1)
        for _ in range(max(ROWS, length)):
            replay.add(row, np.zeros(1, int))
        for _ in range(repeats + 1):
            begin = time.perf_counter()
            replay.sample(batch, length, rng)
            times.append(time.perf_counter() - begin)
        replay.close()
    return summary(times[1:])


def _widths(config: Config) -> str:
    world, train = config.world, config.train
    return (
        f"deter {world.deter}, {world.stoch} x {world.classes} latents, depth {world.depth}, "
        f"{world.coder} coder, units {world.units}, {world.members} members, "
        f"{config.behavior.gradient} gradient; batch {train.batch} x {train.length}, "
        f"horizon {config.behavior.horizon}"
    )


def _compare(peer: Peer, result: Mapping[str, Any]) -> dict[str, Any]:
    ours = result["full"]["median"]
    return {
        "name": peer.name,
        "measured_here": False,
        "seconds": peer.seconds,
        "ratio": ours / peer.seconds,
        "seconds_same_allocator_estimate": peer.kept_memory,
        "ratio_same_allocator_estimate": ours / peer.kept_memory,
    }
