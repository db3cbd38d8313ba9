#!/usr/bin/env python3
"""How far ahead a run's world model can see: the share of the reward's variance it explains.

    tools/model_check.py RUN

Windows of the run's own replay, 8 rows of context, then the recorded actions open loop. ``one`` is
a single imagined sample, as the actor learns from; ``mean`` averages 8. The posterior's line says
what is lost in seeing, the others what is lost in predicting. 1 is perfect, 0 a constant guess.
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
    return 1 - float((prediction - truth).square().mean() / variance)


@torch.no_grad()
def check(folder: Path) -> list[str]:
    """The lines to print for a run folder, which is not touched."""
    agent, _, _, saved = run_folder.load_agent(folder)
    with run_folder.open_replay(folder) as replay:
        rows = replay.sample_within_episodes(WINDOWS, LENGTH, np.random.default_rng(0))
    batch = rows.to(agent.device)
    torch.manual_seed(0)
    world = agent.world
    posterior, _ = world.observe(batch)
    seen, _ = world.outcome(world.features(posterior))
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
        f"posterior      {explained(seen[:, CONTEXT:], truth, variance):6.2f}",
        "decisions      one   mean",
    ]
    for k in range(horizon):
        one = explained(rewards[0, :, k], truth[:, k], variance)
        mean = explained(rewards.mean(0)[:, k], truth[:, k], variance)
        lines.append(f"{k + 1:9d}   {one:6.2f} {mean:6.2f}")
    return lines


if __name__ == "__main__":
    sys.exit(main("model_check", __doc__, check))
