"""Measurements of the runs of a study, beside their returns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from latentplan.study import run_metrics
from latentplan.study.matrix import Job
from latentplan.study.run_metrics import (
    RunMetrics,
    coverage,
    first_reward,
    points,
    read_run_metrics,
    since,
    write_run_metrics,
)
from latentplan.types import Timestep, UserError


def history(reward: list[float], first: list[bool]) -> Timestep:
    n = len(reward)
    return Timestep(
        {"vector": np.zeros((1, n, 2), np.float32)},
        np.zeros((1, n, 1), np.float32),
        np.array([reward], np.float32),
        np.array([first]),
        np.zeros((1, n), bool),
    )


def test_frames_to_the_first_reward_are_environment_frames() -> None:
    """Two decisions of 4 frames, a reset that costs no frames, and then a rewarded decision."""
    rows = history([0, 0, 0.1, 0, 3], [True, False, False, True, False])
    assert first_reward(rows, 4) == 8
    assert first_reward(rows._replace(reward=rows.reward / 10), 4) is None
    assert first_reward(since(rows, 2), 4) == 0  # without the random decisions
    assert since(rows, 3).reward.shape == (1, 0)


def test_coverage_counts_cells_of_the_common_range() -> None:
    line = np.linspace(0, 1, 50, dtype=np.float32).reshape(1, 50, 1)
    assert coverage([points({"v": x}) for x in (line, line * 0.2, line * 0)]) == [4, 1, 1]
    images = np.zeros((1, 3, 64, 64, 3), np.uint8)
    images[0, 1, :16, :16] = 255
    images[0, 2, 48:] = 255
    assert coverage([points({"image": images})]) == [3]


def test_a_run_is_tested_on_runs_of_other_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows come from no run of its own seed. With one seed, they come from all runs."""
    monkeypatch.setattr(run_metrics, "load_resolved", lambda path: None)
    monkeypatch.setattr(run_metrics, "read_metrics", lambda run: [])
    tested_on: dict[str, list[float]] = {}

    def experience(run: Path, config: None) -> run_metrics._Experience:
        return run_metrics._Experience(0, np.zeros((1, 2)), history([float(run.name)], [True]))

    def held_out(run: Path, rows: Timestep) -> tuple[None, ...]:
        tested_on[run.name] = sorted(rows.reward[:, 0].tolist())
        return (None,) * 4

    monkeypatch.setattr(run_metrics, "_experience", experience)
    monkeypatch.setattr(run_metrics, "_held_out", held_out)
    runs = [Path("0"), Path("1"), Path("2")]
    run_metrics.measure(runs, [1, 1, 2])
    assert tested_on == {"0": [2.0], "1": [2.0], "2": [0.0, 1.0]}
    run_metrics.measure(runs[:2], [1, 1])
    assert tested_on["0"] == tested_on["1"] == [0.0, 1.0]


def test_late_metrics_are_means_over_the_last_half_of_the_frames() -> None:
    rows = [{"step": s, "x": float(s)} for s in (1, 2, 3, 4)] + [{"step": 4, "y": 9.0}]
    assert run_metrics._late(rows, "x") == 3.5
    assert run_metrics._late(rows, "z") is None and run_metrics._late([], "x") is None


def test_the_cost_of_an_update_is_that_of_the_whole_run() -> None:
    rows = [{"time": 5.0, "train/updates": 1.0}, {"time": 30.0, "train/updates": 60.0}]
    assert run_metrics._seconds_per_update(rows) == 0.5
    assert run_metrics._seconds_per_update([]) is None
    assert run_metrics._seconds_per_update([{"time": 5.0, "train/updates": 0.0}]) is None


def test_metrics_of_an_earlier_report_are_read(tmp_path: Path) -> None:
    """Their file had another ending. Metrics that compare the runs of a report are left out."""
    job = Job("walker_walk", "dreamer", 3, tmp_path / "run", (), 100)
    metrics = RunMetrics(8, 5, 0.1, 0.2, 0.3, 0.4, None, 0.5, 700.0, 0.25)
    write_run_metrics({job: metrics}, tmp_path / "new")
    (tmp_path / "new_run_metrics.csv").rename(tmp_path / "old_mechanisms.csv")
    expected = RunMetrics(8, None, None, None, None, None, None, 0.5, 700, 0.25)
    assert read_run_metrics(tmp_path / "old") == {job[:3]: expected}
    write_run_metrics({job: metrics._replace(first_reward=9)}, tmp_path / "old")
    assert read_run_metrics(tmp_path / "old") == {job[:3]: expected._replace(first_reward=9)}
    path = tmp_path / "old_run_metrics.csv"
    lines = [line.rsplit(",", 1)[0] for line in path.read_text().splitlines()]
    path.write_text("\n".join(lines))  # earlier versions did not write the last column
    assert read_run_metrics(tmp_path / "old")[job[:3]].update_seconds is None
    with pytest.raises(UserError, match=r"none_run_metrics\.csv"):
        read_run_metrics(tmp_path / "none")
