"""``latentplan diagnose RUN``: says in words which part of an agent may keep it from learning."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import torch

from latentplan.agent import Agent
from latentplan.config.loading import load_resolved
from latentplan.config.schema import Config
from latentplan.envs import pick_renderer
from latentplan.evaluation.episodes import score
from latentplan.evaluation.evaluate import CANDIDATES, summary
from latentplan.inspection.behavior_quality import measure_actor, measure_critic, measure_planner
from latentplan.inspection.calibration_report import SEED
from latentplan.inspection.diagnosis import verdicts
from latentplan.inspection.model_quality import (
    AHEAD,
    measure_model,
    measure_reward,
    measure_uncertainty,
    visit,
)
from latentplan.runs import run_folder
from latentplan.runs.source import RunSource
from latentplan.runtime import disk
from latentplan.runtime.device import pick_device
from latentplan.types import Timestep, UserError, join

COLUMNS = 100  # of the text


def diagnose(
    run: str | Path,
    *,
    episodes: int = 4,
    device: str = "auto",
    module: str = "",
    trust: bool = False,
    checkpoint: str = "",
) -> dict[str, Any]:
    """Measure the parts of a run's agent in held-out episodes, and write RUN/diagnosis.json.

    The policy's mean, its samples and the planner play the same episodes. The episodes of the
    samples are those in which the parts are measured. A run that was trained without a planner gets
    one, as in :func:`latentplan.evaluation.evaluate.evaluate`.

    Args:
        run: the run folder.
        episodes: held-out episodes for each way of acting.
        device: the device of the agent.
        module, trust, checkpoint: as in :func:`latentplan.evaluation.evaluate.evaluate`.

    Returns:
        The content of ``diagnosis.json``: the measured numbers by part, and ``verdicts``.

    Raises:
        UserError: the folder contains no run, the checkpoint is damaged, no renderer works, the
            file cannot be written, or every episode is too short.
    """
    if episodes < 1:
        raise UserError(f"episodes must be at least 1, not {episodes}.")
    folder, place = Path(run), pick_device(device)
    source = RunSource(folder, module, trust, checkpoint)
    agent, config, _, payload = run_folder.load_agent(source, place, (), CANDIDATES)
    path = folder / "diagnosis.json"
    disk.require_writable(path)
    with torch.random.fork_rng([agent.device] if place.type == "cuda" else []):
        torch.manual_seed(SEED)
        measured = measure(agent, config, episodes)
    # The loaded configuration has a planner in any case.
    trained = load_resolved(folder / "config.yaml").plan.candidates > 1
    measured["planner"]["trained"] = trained
    behavior = config.behavior
    used = trained or behavior.improvement == "mpdp" or behavior.caution > 0
    measured["uncertainty"]["used"] = used
    report = {
        "run": str(folder),
        "task": config.task,
        "obs": config.obs,
        "frames": payload["frames"],
        "updates": payload["updates"],
        "episodes": episodes,
        "seed": SEED,
        "candidates": config.plan.candidates,
        **measured,
        "verdicts": verdicts(measured),
    }
    with disk.replacing(path) as file:
        file.write((json.dumps(report, indent=1, allow_nan=False) + "\n").encode())
    return report


def measure(agent: Agent, config: Config, episodes: int) -> dict[str, Any]:
    """Play the episodes, and measure every part in them.

    Raises:
        UserError: every episode is too short.
    """
    sampled: list[Timestep] = []
    modes, renderer = ("mean", "sample", "planner"), pick_renderer(config)
    watch = {"sample": sampled.append}
    scores = dict(score(agent, config, renderer, modes, episodes, SEED, watch=watch))
    rows = join(sampled, np.stack)
    visits = visit(agent, rows)
    if not len(visits.env):
        raise UserError(
            f"The diagnosis needs episodes of more than {AHEAD} decisions, and all were shorter."
        )
    return {
        "scores": {mode: summary(mode, x) for mode, x in scores.items()},
        "model": measure_model(agent, visits),
        "reward": measure_reward(agent, visits),
        "critic": measure_critic(agent, visits),
        "actor": measure_actor(agent, visits),
        "planner": measure_planner(agent, visits),
        "uncertainty": measure_uncertainty(agent, rows),
    }


def to_text(report: dict[str, Any]) -> str:
    """A report as text of at most COLUMNS columns, if the run's path is no longer."""
    scores = ", ".join(f"{mode} {x['mean']:.4g}" for mode, x in report["scores"].items())
    lines = [
        report["run"],
        f"{report['task']} from {report['obs']}, {report['frames']} frames",
        f"scores of {report['episodes']} held-out episodes: {scores}",
        "",
    ]
    for part, x in report["verdicts"].items():
        lines += textwrap.wrap(
            x["sentence"],
            COLUMNS,
            initial_indent=f"{part:<13}{x['verdict']:<11}",
            subsequent_indent=" " * 24,
            break_on_hyphens=False,
        )
    return "\n".join(lines)
