"""``latentplan calibrate RUN``: the calibration of a run's uncertainty on episodes it never saw."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from latentplan.agent import Agent
from latentplan.config.schema import Config
from latentplan.envs import make_eval_env, pick_renderer
from latentplan.evaluation.evaluate import run_episodes
from latentplan.inspection.calibration import (
    CONTEXT,
    HORIZON,
    auroc,
    k_step,
    one_step,
    rank_correlations,
    reliability,
    scalars,
    windows,
)
from latentplan.inspection.plots import pyplot
from latentplan.runs import run_folder
from latentplan.runs.logger import Logger
from latentplan.runtime.device import pick_device
from latentplan.types import Timestep, UserError

RELIABLE_AT = 5  # steps ahead at which the reliability is shown
SEED = 7919  # of the held-out episodes; scores use the run's own seed


def calibrate(
    run: str | Path,
    *,
    episodes: int = 10,
    unseen: str = "",
    device: str = "auto",
    module: str = "",
) -> dict[str, Any]:
    """Numbers, a plot and TensorBoard scalars, written into RUN/calibration and returned.

    Args:
        episodes: played by the sampled policy, held out from training.
        unseen: a task with the same observations and actions that training never saw, to be told
            from the replay; without it there is no AUROC. Beside it stands that of the held-out
            episodes, which were not replayed either: what is new about those is no variant.
        module: as in :func:`latentplan.evaluation.evaluate.evaluate`.

    Raises:
        UserError: no run there, too few episodes, or a variant that does not fit.
    """
    folder = Path(run)
    place = pick_device(device)
    agent, config, _, saved = run_folder.load_agent(folder, place, module=module)
    return calibrate_agent(agent, config, saved, folder, folder, episodes, unseen)


def calibrate_agent(
    agent: Agent,
    config: Config,
    saved: Mapping[str, Any],
    folder: Path,
    out: Path,
    episodes: int,
    unseen: str = "",
) -> dict[str, Any]:
    """The same, of what :func:`run_folder.load_agent` has loaded from a folder; written into
    out/calibration."""
    if episodes < 1:
        raise UserError(f"episodes must be at least 1, not {episodes}.")
    rows = held_out(agent, config, episodes)
    count = len(rows.reward)
    result = k_step(agent, rows.to(agent.device), CONTEXT)
    correlations = rank_correlations(result)
    separation = own = None
    if unseen:
        other = held_out(agent, replace(config, task=unseen), episodes)
        with run_folder.open_replay(folder) as replay:
            rng = np.random.default_rng(SEED)
            known = replay.sample_within_episodes(count, CONTEXT + HORIZON, rng)
        if not len(known.reward):
            raise UserError(f"No episode of the replay lasted {CONTEXT + HORIZON} decisions.")
        of_known, of_unseen, of_new = (
            one_step(agent, x.to(agent.device), CONTEXT) for x in (known, other, rows)
        )
        separation, own = auroc(of_known, of_unseen), auroc(of_known, of_new)
    report = {
        "run": str(folder),
        "task": config.task,
        "measure": config.world.uncertainty,
        "members": config.world.uncertainty_members,
        "frames": saved["frames"],
        "updates": saved["updates"],
        "windows": count,
        "rank_correlation": correlations,
        "mean_error": {k: x.mean(0).tolist() for k, x in result.errors.items()},
        "reliability": {"steps": RELIABLE_AT, **reliability(result, RELIABLE_AT)},
        "unseen": unseen or None,
        "auroc": separation,
        "auroc_same_task": own,
    }
    place = out / "calibration"
    place.mkdir(parents=True, exist_ok=True)
    (place / "calibration.json").write_text(json.dumps(report, indent=1) + "\n")
    report["plot"] = str(draw(report, place / "calibration.png"))
    logger = Logger(place, frame=saved["frames"])
    logger.write(saved["frames"], now=scalars(correlations, separation))
    logger.close()
    return report


def held_out(agent: Agent, config: Config, episodes: int) -> Timestep:
    """Windows (B, CONTEXT + HORIZON), overlapping, of episodes played by the sampled policy."""
    renderer = pick_renderer(config)
    with make_eval_env(config, renderer, 1, SEED) as env:
        for what in ("obs", "action_dim"):
            if getattr(env.spec, what) != getattr(agent.world.spec, what):
                raise UserError(f"{config.task} has other observations or actions than the agent.")
        rows = run_episodes(agent, env, episodes, "sample").rows
    found = windows(rows, CONTEXT + HORIZON, CONTEXT)
    if not len(found.reward):
        raise UserError(
            f"No episode lasted {CONTEXT + HORIZON} decisions: nothing to calibrate on."
        )
    return found


def draw(report: dict[str, Any], path: Path) -> Path:
    """Rank correlation and error against steps ahead, and the reliability."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    for name, rho in report["rank_correlation"].items():
        steps = range(1, len(rho) + 1)
        axes[0].plot(steps, rho, marker=".", label=name)
        error = np.asarray(report["mean_error"][name])
        axes[1].plot(steps, error / max(error[-1], 1e-12), marker=".", label=name)
        bins = report["reliability"][name]
        largest = max(*bins["error"], 1e-12)
        axes[2].plot(bins["uncertainty"], np.asarray(bins["error"]) / largest, marker=".")
    axes[0].axhline(0, color="gray", linewidth=1)
    labels = (
        ("steps ahead", "rank correlation with the error"),
        ("steps ahead", "mean error, of the last"),
        (f"summed uncertainty, {RELIABLE_AT} steps", "mean error, of the largest"),
    )
    for axis, (x, y) in zip(axes, labels, strict=True):
        axis.set_xlabel(x)
        axis.set_ylabel(y)
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
