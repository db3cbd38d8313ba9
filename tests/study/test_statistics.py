from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from environments import ROOT

from latentplan.cli.main import main
from latentplan.inspection.curves import Curve
from latentplan.study.report import Result, _over_tasks
from latentplan.study.run_metrics import UNKNOWN
from latentplan.study.statistics import aggregate


def test_aggregates_equal_values_computed_by_hand() -> None:
    first = {"a": [0.0, 10.0, 20.0, 30.0], "b": [5.0, 10.0, 40.0, 45.0]}
    second = {"a": [100.0, 100.0], "b": [100.0, 100.0]}
    result = aggregate({"x": first, "y": second}, "a")
    assert result["a"].mean.value == (15 + 100) / 2  # a task has one weight for any number of runs
    assert result["a"].improvement is None
    above = (1 + 1.5 + 4 + 4) / 16  # over the pairs of task x; task y is a tie
    assert result["b"].improvement.value == pytest.approx((above + 0.5) / 2)
    assert aggregate({"x": first, "y": second}, "b")["a"].improvement.value == pytest.approx(
        1 - (above + 0.5) / 2
    )
    single = aggregate({"x": first}, "a")
    assert single["a"].iqm.value == 15 and single["b"].iqm.value == 25


def test_the_interquartile_mean_ignores_the_best_and_the_worst_run() -> None:
    scores = {"x": {"a": [-1000.0, 10.0]}, "y": {"a": [20.0, 9000.0]}}
    assert aggregate(scores, "a")["a"].iqm.value == 15
    assert aggregate(scores, "a")["a"].mean.value == (-990 + 9020) / 4


def test_resampling_keeps_runs_within_their_task() -> None:
    """If the runs of a task are equal, intervals have no width, for all differences of tasks."""
    scores = {f"{task}": {"a": [task] * 3, "b": [task + 1] * 3} for task in (0.0, 500.0, 1000.0)}
    result = aggregate(scores, "a")
    assert result["a"].mean == (500, 500, 500)
    assert result["b"].improvement == (1, 1, 1)


def test_intervals_of_three_runs_on_four_tasks_cover_86_percent() -> None:
    rng = np.random.default_rng(3)
    centers = rng.uniform(0, 1000, size=4)
    inside, trials = 0, 200
    for _ in range(trials):
        runs = rng.normal(centers[:, None], 100, size=(4, 3))
        _, low, high = aggregate({str(i): {"a": x} for i, x in enumerate(runs)}, "a")["a"].mean
        inside += low < centers.mean() < high
    assert 0.80 < inside / trials < 0.92  # 0.86, plus or minus 2.5 standard errors


@pytest.mark.parametrize("name", ["planner_state", "distilled_state", "parity_state"])
def test_documents_show_what_the_report_prints(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)  # the folder of the study's runs is not here
    study, results = ROOT / f"configs/study/{name}.yaml", ROOT / f"docs/results/{name}"
    assert main(["study", "report", str(study), "--also", str(results), "--out", "again"]) == 0
    document = (ROOT / "docs/results.md").read_text()
    aggregated = capsys.readouterr().out.split("\n\n")[1].splitlines()
    assert len(aggregated) > 3
    for line in aggregated:
        assert line in document


def test_runs_that_cannot_be_aggregated_are_left_out() -> None:
    def runs(*scores: float, done: bool = True) -> list[Result]:
        return [Result(Curve({}, [{"mean": 0.0}, {"mean": x}]), UNKNOWN, done) for x in scores]

    names = ["dreamer", "mpdp"]
    both = {"mpdp": runs(3, 4, done=False), "dreamer": runs(1, 2)}
    single = {"dreamer": runs(900, 901), "mpdp": runs(1)}  # one run cannot be resampled
    lacking = {"dreamer": runs(900, 901)}
    assert (
        _over_tasks({"walker_walk": both, "hopper_hop": lacking}, names) == []
    )  # one task is left
    assert _over_tasks({"walker_walk": both, "hopper_hop": single}, names) == []
    assert _over_tasks({"walker_walk": lacking, "hopper_hop": lacking}, ["dreamer"]) == []
    panels = {"walker_walk": both, "hopper_hop": lacking, "dmc:cheetah_run": both}
    table, caption = _over_tasks(panels, names)
    head, _, first, second = table.splitlines()
    assert "over 2 tasks" in head and "better than dreamer" in head
    assert "walker_walk" in caption and "hopper_hop" not in caption
    assert first.startswith("| dreamer | 2 [1, 2] | 2 [1, 2] |  | 1 [")
    assert second.startswith("| mpdp (unfinished) | 4 [3, 4] | 4 [3, 4] | 1.00 [1.00, 1.00] | 2 [")
    # Returns of other environments have other units, so only probabilities are aggregated.
    rows = _over_tasks(panels | {"gym:Pendulum-v1": both}, names)[0].splitlines()
    assert rows[-1] == "| mpdp (unfinished) | 1.00 [1.00, 1.00] | 1.00 [1.00, 1.00] |"
