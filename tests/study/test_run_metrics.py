"""What a study measures of its runs beside their returns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from latentplan.study import run_metrics as mechanisms
from latentplan.study.run_metrics import coverage, first_reward, points, since
from latentplan.types import Timestep


def history(reward: list[float], first: list[bool]) -> Timestep:
    n = len(reward)
    return Timestep(
        {"vector": np.zeros((1, n, 2), np.float32)},
        np.zeros((1, n, 1), np.float32),
        np.array([reward], np.float32),
        np.array([first]),
        np.zeros((1, n), bool),
    )


def test_frames_to_the_first_reward_are_frames_of_the_environment() -> None:
    """Two decisions of 4 frames, an end and a reset that costs nothing, then a rewarded one."""
    met = history([0, 0, 0.1, 0, 3], [True, False, False, True, False])
    assert first_reward(met, 4) == 8
    assert first_reward(met._replace(reward=met.reward / 10), 4) is None
    assert first_reward(since(met, 2), 4) == 0  # the random decisions are left out
    assert since(met, 3).reward.shape == (1, 0)


def test_coverage_counts_cells_of_the_common_range() -> None:
    line = np.linspace(0, 1, 50, dtype=np.float32).reshape(1, 50, 1)
    assert coverage([points({"v": x}) for x in (line, line * 0.2, line * 0)]) == [4, 1, 1]
    pictures = np.zeros((1, 3, 64, 64, 3), np.uint8)
    pictures[0, 1, :16, :16] = 255
    pictures[0, 2, 48:] = 255
    assert coverage([points({"image": pictures})]) == [3]


def test_a_run_is_tested_on_runs_of_other_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same seed neither itself nor another ablation; on all rows where there is but one."""
    monkeypatch.setattr(mechanisms, "load_resolved", lambda path: None)
    monkeypatch.setattr(mechanisms, "read_metrics", lambda run: [])
    seen: dict[str, list[float]] = {}

    def experience(run: Path, config: None) -> mechanisms._Experience:
        return mechanisms._Experience(0, np.zeros((1, 2)), history([float(run.name)], [True]))

    def held_out(run: Path, rows: Timestep) -> tuple[None, ...]:
        seen[run.name] = sorted(rows.reward[:, 0].tolist())
        return (None,) * 4

    monkeypatch.setattr(mechanisms, "_experience", experience)
    monkeypatch.setattr(mechanisms, "_held_out", held_out)
    runs = [Path("0"), Path("1"), Path("2")]
    mechanisms.measure(runs, [1, 1, 2])
    assert seen == {"0": [2.0], "1": [2.0], "2": [0.0, 1.0]}
    mechanisms.measure(runs[:2], [1, 1])
    assert seen["0"] == seen["1"] == [0.0, 1.0]


def test_late_is_the_last_half_of_the_frames() -> None:
    rows = [{"step": s, "x": float(s)} for s in (1, 2, 3, 4)] + [{"step": 4, "y": 9.0}]
    assert mechanisms._late(rows, "x") == 3.5
    assert mechanisms._late(rows, "z") is None and mechanisms._late([], "x") is None
