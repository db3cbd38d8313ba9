"""``latentplan calibrate RUN``: the calibration of a run's uncertainty on held-out episodes."""

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
from latentplan.evaluation.episodes import run_episodes
from latentplan.inspection.calibration import (
    CONTEXT,
    HORIZON,
    auroc,
    k_step_errors,
    one_step_uncertainty,
    rank_correlations,
    reliability,
    scalars,
    windows,
)
from latentplan.inspection.plots import pyplot
from latentplan.runs import run_folder
from latentplan.runs.logger import Logger
from latentplan.runs.source import RunSource
from latentplan.runtime.device import pick_device
from latentplan.types import Timestep, UserError, join

RELIABILITY_STEPS = 5  # steps ahead at which the reliability is computed
SEED = 7919  # seed of the held-out episodes; scores use the seed of the run


def calibrate(
    run: str | Path,
    *,
    episodes: int = 10,
    unseen: str = "",
    device: str = "auto",
    module: str = "",
    trust: bool = False,
    checkpoint: str = "",
) -> dict[str, Any]:
    """Measure how well the uncertainty of a run predicts the errors of its model.

    The numbers, a plot and TensorBoard scalars are written to RUN/calibration.

    Args:
        run: the run folder.
        episodes: held-out episodes, which the sampled policy plays.
        unseen: a task with the same observations and actions that training never saw. The report
            then has the AUROC with which the uncertainty separates it from the replay. For
            comparison, ``auroc_same_task`` is the AUROC of the held-out episodes, which are not in
            the replay either. Without an unseen task there is no AUROC.
        device: the device of the agent.
        module, trust, checkpoint: as in :func:`latentplan.evaluation.evaluate.evaluate`.

    Returns:
        The content of ``calibration.json``, and the path of the plot.

    Raises:
        UserError: the folder contains no run, the episodes are too few or too short, the unseen
            task has other observations or actions, or matplotlib is not installed.
    """
    folder = Path(run)
    source = RunSource(folder, module, trust, checkpoint)
    agent, config, _, payload = run_folder.load_agent(source, pick_device(device))
    return calibrate_agent(agent, config, payload, folder, folder, episodes, unseen)


def calibrate_agent(
    agent: Agent,
    config: Config,
    payload: Mapping[str, Any],
    folder: Path,
    out: Path,
    episodes: int,
    unseen: str = "",
) -> dict[str, Any]:
    """Do the work of :func:`calibrate` for an agent that is already loaded.

    Args:
        agent, config, payload: results of :func:`run_folder.load_agent`.
        folder: the run folder.
        out: the files are written to ``out/calibration``.
        episodes, unseen: as in :func:`calibrate`.
    """
    if episodes < 1:
        raise UserError(f"episodes must be at least 1, not {episodes}.")
    rows = held_out(agent, config, episodes)
    count = len(rows.reward)
    result = k_step_errors(agent, rows.to(agent.device), CONTEXT)
    correlations = rank_correlations(result)
    separation = separation_same_task = None
    if unseen:
        unseen_rows = held_out(agent, replace(config, task=unseen), episodes)
        with run_folder.open_replay(folder) as replay:
            rng = np.random.default_rng(SEED)
            replayed = replay.sample_within_episodes(count, CONTEXT + HORIZON, rng)
        if not len(replayed.reward):
            raise UserError(f"No episode of the replay lasted {CONTEXT + HORIZON} decisions.")
        of_replayed, of_unseen, of_held_out = (
            one_step_uncertainty(agent, x.to(agent.device), CONTEXT)
            for x in (replayed, unseen_rows, rows)
        )
        separation = auroc(of_replayed, of_unseen)
        separation_same_task = auroc(of_replayed, of_held_out)
    report = {
        "run": str(folder),
        "task": config.task,
        "measure": config.world.uncertainty,
        "members": config.world.uncertainty_members,
        "frames": payload["frames"],
        "updates": payload["updates"],
        "windows": count,
        "rank_correlation": correlations,
        "mean_error": {k: x.mean(0).tolist() for k, x in result.errors.items()},
        "reliability": {"steps": RELIABILITY_STEPS, **reliability(result, RELIABILITY_STEPS)},
        "unseen": unseen or None,
        "auroc": separation,
        "auroc_same_task": separation_same_task,
    }
    target = out / "calibration"
    target.mkdir(parents=True, exist_ok=True)
    (target / "calibration.json").write_text(json.dumps(report, indent=1) + "\n")
    report["plot"] = str(draw_plot(report, target / "calibration.png"))
    logger = Logger(target, frame=payload["frames"])
    logger.write(payload["frames"], now=scalars(correlations, separation))
    logger.close()
    return report


def held_out(agent: Agent, config: Config, episodes: int) -> Timestep:
    """Let the sampled policy play episodes, and cut them into overlapping windows.

    Returns:
        (B, CONTEXT + HORIZON) numpy arrays.

    Raises:
        UserError: the task has other observations or actions than the agent, or every episode is
            shorter than a window.
    """
    renderer = pick_renderer(config)
    with make_eval_env(config, renderer, 1, SEED) as env:
        for field in ("obs", "action_dim"):
            if getattr(env.spec, field) != getattr(agent.world.spec, field):
                raise UserError(f"{config.task} has other observations or actions than the agent.")
        rows: list[Timestep] = []
        run_episodes(agent, env, episodes, "sample", watch=rows.append)
    result = windows(join(rows, np.stack), CONTEXT + HORIZON, CONTEXT)
    if not len(result.reward):
        raise UserError(
            f"The calibration needs episodes of at least {CONTEXT + HORIZON} decisions, and all "
            "were shorter."
        )
    return result


def draw_plot(report: dict[str, Any], path: Path) -> Path:
    """Plot rank correlation and error against steps ahead, and the reliability.

    Args:
        report: the content of ``calibration.json``.
        path: the PNG to write, which is also the result.
    """
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
        ("steps ahead", "mean error / error of the last step"),
        (f"summed uncertainty, {RELIABILITY_STEPS} steps", "mean error / largest mean error"),
    )
    for axis, (x, y) in zip(axes, labels, strict=True):
        axis.set_xlabel(x)
        axis.set_ylabel(y)
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
