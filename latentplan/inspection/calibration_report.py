"""``latentplan calibrate RUN``: a run's uncertainty and predicted ends on held-out episodes."""

from __future__ import annotations

import json
import math
import textwrap
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
from latentplan.inspection.continue_calibration import (
    calibrate_continue,
    continue_verdict,
    draw_continue,
)
from latentplan.inspection.diagnosis import RANKS
from latentplan.inspection.plots import pyplot
from latentplan.runs import run_folder
from latentplan.runs.logger import Logger
from latentplan.runs.source import RunSource
from latentplan.runtime.device import pick_device
from latentplan.types import Timestep, UserError, join

RELIABILITY_STEPS = 5  # steps ahead at which the reliability is computed
GOOD_RANKS = 0.5  # rank correlation: a quarter of the variance of the ranks is explained
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

    Where episodes terminate, the predicted probability that they continue is measured as well.

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
        The content of ``calibration.json``, with a ``verdict`` in words, and the path of the plot.

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
    played = play(agent, config, episodes)
    rows = held_out(played)
    count = len(rows.reward)
    result = k_step_errors(agent, rows.to(agent.device), CONTEXT)
    correlations = rank_correlations(result)
    separation = separation_same_task = None
    if unseen:
        unseen_rows = held_out(play(agent, replace(config, task=unseen), episodes))
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
        "continue": calibrate_continue(agent, played),
    }
    report["verdict"] = verdict(report)
    target = out / "calibration"
    target.mkdir(parents=True, exist_ok=True)
    (target / "calibration.json").write_text(json.dumps(report, indent=1) + "\n")
    report["plot"] = str(draw_plot(report, target / "calibration.png"))
    logger = Logger(target, frame=payload["frames"])
    logger.write(payload["frames"], now=scalars(correlations, separation))
    logger.close()
    return report


def play(agent: Agent, config: Config, episodes: int) -> Timestep:
    """Let the sampled policy play episodes.

    Returns:
        (T, 1) numpy arrays, one episode after the other.

    Raises:
        UserError: the task has other observations or actions than the agent.
    """
    renderer = pick_renderer(config)
    with make_eval_env(config, renderer, 1, SEED) as env:
        for field in ("obs", "action_dim", "action_groups"):
            if getattr(env.spec, field) != getattr(agent.world.spec, field):
                raise UserError(f"{config.task} has other observations or actions than the agent.")
        rows: list[Timestep] = []
        run_episodes(agent, env, episodes, "sample", watch=rows.append)
    return join(rows, np.stack)


def held_out(played: Timestep) -> Timestep:
    """Cut episodes into overlapping windows.

    Args:
        played: a result of :func:`play`.

    Returns:
        (B, CONTEXT + HORIZON) numpy arrays.

    Raises:
        UserError: every episode is shorter than a window.
    """
    result = windows(played, CONTEXT + HORIZON, CONTEXT)
    if not len(result.reward):
        raise UserError(
            f"The calibration needs episodes of at least {CONTEXT + HORIZON} decisions, and all "
            "were shorter."
        )
    return result


def verdict(report: Mapping[str, Any]) -> str:
    """What the numbers of a report mean, in words: the uncertainty, and the predicted ends."""
    return f"{_uncertainty_verdict(report)} {continue_verdict(report['continue'])}"


def _uncertainty_verdict(report: Mapping[str, Any]) -> str:
    rho = report["rank_correlation"]["latent"][RELIABILITY_STEPS - 1]
    if not math.isfinite(rho):
        return (
            "There is no verdict: the uncertainty or the error is the same in all windows. "
            "An ensemble of one member never disagrees."
        )
    reward = report["rank_correlation"]["reward"][RELIABILITY_STEPS - 1]
    also = f", and {reward:.2f} with that of the reward" if math.isfinite(reward) else ""
    fact = (
        f"rank correlation {rho:.2f} with the error of the latent state{also}, "
        f"{RELIABILITY_STEPS} decisions ahead, in {report['windows']} windows; 0 is chance and 1 "
        "is perfect"
    )
    if rho < RANKS:
        meaning = (
            "The uncertainty does not tell where the model errs, so neither a bonus nor a penalty "
            "for it is of use"
        )
    elif rho < GOOD_RANKS:
        meaning = "The uncertainty tells roughly where the model errs"
    else:
        meaning = "The uncertainty tells well where the model errs"
    sentence = f"{meaning} ({fact})."
    if report["auroc"] is not None:
        sentence += (
            f" It is higher in {report['unseen']} than in the replay with probability "
            f"{report['auroc']:.2f}; 0.5 is chance."
        )
    return sentence


def draw_plot(report: dict[str, Any], path: Path) -> Path:
    """Plot the mean errors of windows against their uncertainty, under the verdict.

    The windows are in groups of equal size, from the least to the most uncertain one. An error of 1
    is the mean over all groups. Where episodes terminated, a second panel has the reliability of
    the predicted probability that they continue.

    Args:
        report: the content of ``calibration.json``.
        path: the PNG to write, which is also the result.
    """
    plt = pyplot()
    ends = report["continue"]
    panels = 1 if ends is None else 2
    figure, axes = plt.subplots(
        1, panels, figsize=(8 * panels, 4.8), layout="constrained", squeeze=False
    )
    _draw_errors(axes[0, 0], report)
    if ends is not None:
        draw_continue(axes[0, 1], ends)
    run = Path(report["run"]).absolute().name
    described = f"{run}, {report['task']}, frame {report['frames']:,}"
    wrapped = textwrap.fill(report["verdict"], 105 * panels)
    figure.suptitle(f"{described}\n{wrapped}", fontsize=9, x=0.01, ha="left")
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _draw_errors(axis: Any, report: Mapping[str, Any]) -> None:
    groups = 0
    for name in report["rank_correlation"]:
        errors = np.asarray(report["reliability"][name]["error"])
        groups = len(errors)
        relative = errors / max(float(errors.mean()), 1e-12)
        label = "latent state" if name == "latent" else name
        axis.plot(range(1, groups + 1), relative, marker="o", label=f"error of the {label}")
    axis.axhline(1, color="gray", linewidth=1, linestyle="--", label="no relation")
    axis.set_xticks(
        range(1, groups + 1),
        ["least", *map(str, range(2, groups)), "most"] if groups > 1 else ["all"],
    )
    axis.set_ylim(bottom=0)
    axis.set_xlabel(f"windows in {groups} groups, by the uncertainty of the model")
    axis.set_ylabel(f"error, {RELIABILITY_STEPS} decisions ahead / mean error")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=9)
