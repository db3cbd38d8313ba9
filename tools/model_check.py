#!/usr/bin/env python3
"""Print the fraction of the reward's variance that a run's world model explains, by steps ahead.

    tools/model_check.py RUN

The model observes 8 rows of windows of the run's replay, and then imagines the recorded actions
without observations. ``one`` uses a single imagined sample, as the actor does; ``mean`` uses the
mean of 8. The line of the posterior shows the errors of observation, the other lines those of
prediction. The value 1 is perfect; the value 0 is that of a constant prediction.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from run_check import main
from torch import Tensor

from latentplan.behavior.imagination import follow, imagine
from latentplan.runs import run_folder
from latentplan.types import Latent

LENGTH, CONTEXT, WINDOWS, SAMPLES = 24, 8, 256, 8


def explained(prediction: Tensor, truth: Tensor, variance: Tensor) -> float:
    """The fraction of the variance of ``truth`` that the prediction explains."""
    return 1 - float((prediction - truth).square().mean() / variance)


@torch.no_grad()
def check(folder: Path) -> list[str]:
    """The lines of text for a run folder. No file of it is changed."""
    agent, _, _, saved = run_folder.load_agent(folder)
    with run_folder.open_replay(folder) as replay:
        rows = replay.sample_within_episodes(WINDOWS, LENGTH, np.random.default_rng(0))
    batch = rows.to(agent.device)
    torch.manual_seed(0)
    world = agent.world
    posterior, _ = world.observe(batch)
    observed, _ = world.outcome(world.features(posterior))
    truth, actions = batch.reward[:, CONTEXT:], batch.prev_action[:, CONTEXT:]
    variance = truth.var()
    start = Latent(*(x[:, CONTEXT - 1] for x in posterior))
    n, horizon = truth.shape
    rewards = torch.stack(
        [
            imagine(
                world.step_unmeasured,
                follow(actions),
                start,
                horizon,
                world.draw_noise(n, horizon),
            ).reward
            for _ in range(SAMPLES)
        ]
    )
    lines = [
        f"{folder}: {saved['frames']} frames, {saved['updates']} updates, {n} windows",
        f"posterior      {explained(observed[:, CONTEXT:], truth, variance):6.2f}",
        "decisions      one   mean",
    ]
    for k in range(horizon):
        one = explained(rewards[0, :, k], truth[:, k], variance)
        mean = explained(rewards.mean(0)[:, k], truth[:, k], variance)
        lines.append(f"{k + 1:9d}   {one:6.2f} {mean:6.2f}")
    return lines


if __name__ == "__main__":
    sys.exit(main("model_check", __doc__, check))
