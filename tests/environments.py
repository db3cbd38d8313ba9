"""Helpers that make environments and step through them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from latentplan.config.schema import EnvConfig
from latentplan.envs import VectorEnv, make_vector
from latentplan.envs.rendering import Renderer
from latentplan.types import Timestep

ROOT = Path(__file__).resolve().parents[1]


def make(
    task: str,
    obs: str = "state",
    *,
    num_envs: int = 1,
    seed: int = 0,
    mode: str = "train",
    renderer: Renderer | None = None,
    first_episodes: Sequence[int] | None = None,
    **settings: Any,
) -> VectorEnv:
    """Make a vector environment. It runs in this process unless ``workers`` is set."""
    env = EnvConfig(**{"workers": False, **settings})
    return make_vector(
        task,
        obs,
        env,
        num_envs=num_envs,
        seed=seed,
        mode=mode,
        renderer=renderer,
        first_episodes=first_episodes,
    )


def walk(env: VectorEnv, steps: int, seed: int = 0) -> tuple[list[Timestep], list[np.ndarray]]:
    """Reset, apply random actions, and return the rows and their frames."""
    rng = np.random.default_rng(seed)
    row, frames = env.reset()
    rows, counts = [row], [frames]
    for _ in range(steps):
        row, frames = env.step(rng.uniform(-1, 1, (env.num_envs, env.spec.action_dim)))
        rows.append(row)
        counts.append(frames)
    return rows, counts


def children() -> set[int]:
    """The ids of worker processes, without the resource tracker of multiprocessing."""
    return {
        child.pid
        for child in psutil.Process().children(recursive=True)
        if "spawn_main" in " ".join(child.cmdline())
    }


def run_python(*arguments: str, **variables: str) -> str:
    """Run ``python ARGUMENTS`` with the package on its path, and return its standard output."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout
