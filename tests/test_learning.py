"""The whole program learns a task from pixels: what every other test cannot promise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from environments import make

from latentplan.config import load
from latentplan.evaluate import evaluate
from latentplan.train import train

EPISODES = 10
REPEAT = 4


def score_of_chance() -> float:
    """What actions drawn evenly earn in an episode, on the episodes of the evaluation below."""
    rng = np.random.default_rng(0)
    with make("dummy:pixels", "state", mode="eval", repeat=REPEAT) as env:
        env.reset()
        total = 0.0
        while env.episodes[0] <= EPISODES:
            row, _ = env.step(rng.uniform(-1, 1, (1, 2)))
            total += float(row.reward[0])
    return total / EPISODES


@pytest.mark.last
@pytest.mark.parametrize("gradient", ["pathwise", "reinforce"])
def test_a_task_is_learned_from_pixels(tmp_path: Path, gradient: str) -> None:
    """About half a minute on one core for 64 episodes, 16 decisions each."""
    config = load(
        [],
        [
            *("task=dummy:pixels", "size=tiny", "device=cpu", f"run_dir={tmp_path / 'run'}"),
            *("env.image_size=32", f"env.repeat={REPEAT}", "env.workers=false", "steps=4096"),
            *("train.ratio=64", "train.prefill=200", "train.precision=float32", "train.threads=1"),
            *("behavior.horizon=8", "behavior.discount_horizon=20"),
            *(f"behavior.gradient={gradient}", "eval.every=0", "log.film_every=0"),
        ],
    )
    train(config)
    learned = evaluate(tmp_path / "run", episodes=EPISODES, device="cpu")["mean"]
    chance = score_of_chance()
    # Measured over three seeds: chance 12, learned 40 to 44. Always at the goal would be 64.
    assert chance > 5
    assert learned > 2 * chance, f"{learned:.1f} against {chance:.1f} by chance"
