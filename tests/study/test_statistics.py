from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from environments import ROOT

from latentplan.cli.main import main
from latentplan.inspection.curves import Curve
from latentplan.study.html_page import Figure, page
from latentplan.study.results import Result
from latentplan.study.run_metrics import UNKNOWN
from latentplan.study.statistics import aggregate, median_frames, profile, ratio, runs_needed
from latentplan.study.tables import HEAD, Table, beside_published, over_tasks, per_task


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
    parts = capsys.readouterr().out.split("\n\n")
    aggregated = [part.splitlines() for part in parts if " tasks | " in part]
    assert len(aggregated) == 2 and all(len(table) > 3 for table in aggregated)
    for line in (line for table in aggregated for line in table):
        assert line in document


def results(
    *scores: float, first: float = 0.0, done: bool = True, repeat: int = 4, obs: str = "state"
) -> list[Result]:
    return [
        Result(
            Curve(
                {"obs": obs, "repeat": repeat},
                [
                    {"frame": 50_000, "mean": first, "planner": None, "seconds": 60},
                    {"frame": 100_000, "mean": x, "planner": x + 5, "seconds": 120},
                ],
            ),
            UNKNOWN,
            done,
        )
        for x in scores
    ]


def test_runs_that_cannot_be_aggregated_are_left_out() -> None:
    names = ["dreamer", "mpdp"]
    both = {"mpdp": results(3, 4, done=False), "dreamer": results(1, 2)}
    single = {"dreamer": results(900, 901), "mpdp": results(1)}  # one run cannot be resampled
    lacking = {"dreamer": results(900, 901)}
    assert over_tasks({"walker_walk": both, "hopper_hop": lacking}, names) == []  # one task is left
    assert over_tasks({"walker_walk": both, "hopper_hop": single}, names) == []
    assert over_tasks({"walker_walk": lacking, "hopper_hop": lacking}, ["dreamer"]) == []
    panels = {"walker_walk": both, "hopper_hop": lacking, "dmc:cheetah_run": both}
    final, area = over_tasks(panels, names)
    assert final.head[0] == "final return over 2 tasks" and "better than dreamer" in final.head
    assert "walker_walk" in final.caption and "hopper_hop" not in final.caption
    first, second = final.rows
    assert first == ["dreamer", *["2 [1, 2]"] * 3, "0.999 [0.998, 0.999]", "", ""]
    assert second[:2] == ["mpdp (unfinished)", "4 [3, 4]"]
    assert second[5] == "1.00 [1.00, 1.00]" and second[6].startswith("2.33 [1.")
    assert area.rows[0][1] == "1 [0, 1]" and "for 10%" in area.caption
    # Returns of other environments have other units, so only comparisons are aggregated.
    other, _ = over_tasks(panels | {"gym:Pendulum-v1": both}, names)
    assert len(other.head) == 3 and other.rows[-1][1] == "1.00 [1.00, 1.00]"


def test_a_row_has_what_a_run_cost_and_when_it_came_to_the_level() -> None:
    panels = {"walker_walk": {"dreamer": results(100, 600, 800), "mpdp": results(30, 40)}}
    table = per_task(panels, 0)
    first, second = (dict(zip(table.head, row, strict=True)) for row in table.rows)
    assert "250 for walker_walk" in table.caption  # half of the mean of the better one
    name = "frames to the level: median (runs that reach it)"
    assert first[name] == "100,000 (2 of 3)" and second[name] == "(0 of 2)"
    assert first["minutes"] == "2.0" and first["planner minus actor"] == "5"
    assert "a return of 35" in per_task(panels, 35).caption
    assert dict(zip(HEAD, per_task(panels, 35).rows[1], strict=True))[name] == "100,000 (1 of 2)"


def test_the_level_of_a_task_with_negative_returns_can_be_reached() -> None:
    table = per_task({"gym:Acrobot-v1": {"dreamer": results(-500, -100, -80, first=-500)}}, 0)
    row = dict(zip(table.head, table.rows[0], strict=True))
    assert "-340 for gym:Acrobot-v1" in table.caption  # the best final return is -227
    assert row["frames to the level: median (runs that reach it)"] == "100,000 (2 of 3)"


def test_the_ratio_is_a_geometric_mean_over_tasks() -> None:
    ours = [np.array([20.0, 20.0]), np.array([400.0, 400.0])]
    baseline = [np.array([10.0, 10.0]), np.array([800.0, 800.0])]
    assert ratio(ours, baseline) == pytest.approx((1, 1, 1))
    value, low, high = ratio([x * [1, 3] for x in ours], baseline)
    assert value == pytest.approx(2) and low == pytest.approx(1) and high == pytest.approx(3)
    assert ratio([np.array([-1.0, 5.0])], [np.array([1.0, 2.0])]) is None
    assert ratio([np.array([0.0, 0.0])], [np.array([1.0, 2.0])]) is None
    # A run without a return may be all that a resample has, on either side or on both.
    value, low, high = ratio([np.array([0.0, 6.0])], [np.array([0.0, 3.0])])
    assert value == pytest.approx(2) and low == pytest.approx(0.001) and high == pytest.approx(1000)
    value, low, _ = ratio([np.array([0.0, *[6.0] * 5])], [np.full(6, 5.0)])
    assert value == pytest.approx(1) and 0.3 < low < 0.9


def test_the_interval_of_the_ratio_covers_the_truth() -> None:
    """Six runs on each of six tasks, with a standard deviation of 30 %, and a true ratio of 1.2."""
    rng = np.random.default_rng(0)
    inside, trials = 0, 100
    for _ in range(trials):
        scale = rng.uniform(10, 900, size=(6, 1))
        ours, others = (scale * rng.lognormal(0, 0.3, (6, 6)) for _ in range(2))
        _, low, high = ratio([*(1.2 * ours)], [*others])
        inside += low < 1.2 < high
    assert 0.83 < inside / trials < 0.98  # about 0.91: too narrow for few runs


def test_the_power_note_agrees_with_a_simulation() -> None:
    rng = np.random.default_rng(0)
    scores = {str(task): {"a": rng.normal(100, 30, 400)} for task in range(6)}
    (needed,) = runs_needed(scores, [0.2])
    found, trials = 0, 400
    for _ in range(trials):
        ours, others = rng.normal(120, 36, (6, needed)), rng.normal(100, 30, (6, needed))
        logs = np.log(ours.mean(1)) - np.log(others.mean(1))
        found += logs.mean() > 1.96 * 0.3 * np.sqrt(2 / (6 * needed))
    assert 0.7 < found / trials < 0.9  # 0.8
    assert runs_needed({"x": {"a": [-1.0, 0.5]}}, [0.1]) is None


def test_runs_that_end_before_the_level_count_as_censored() -> None:
    assert median_frames([10, 20, 30, 40], [True, True, True, False]) == 20
    assert median_frames([10, 20, 20], [True, False, False]) is None
    # A run that ended early, at 5, says nothing about later frames.
    assert median_frames([5, 10, 20], [False, True, True]) == 10


def test_a_profile_is_the_fraction_of_runs_above_a_level() -> None:
    tasks = [np.array([100.0, 300.0]), np.array([300.0, 500.0])]
    assert [x.value for x in profile(tasks, [0, 200, 400, 600])] == [1, 0.75, 0.25, 0]
    assert profile(tasks, [200])[0][1:] == (0.5, 1)


def test_published_returns_stand_beside_those_of_the_same_protocol() -> None:
    pixels = results(300, 500, repeat=2, obs="pixels")
    (table,), notes = beside_published({"walker_walk": {"dreamer": pixels}})
    ((task, frames, ours, others),) = table.rows
    assert (task, frames, ours) == ("walker_walk", "100,000", "dreamer 400") and notes == []
    assert "DrQ-v2" in others and "DreamerV3" not in others  # that one averaged training episodes
    wrong = {
        "action repeat 2": results(1, 2, repeat=4, obs="pixels"),
        "obs=state": results(1, 2, repeat=2),
    }
    for reason, group in wrong.items():
        tables, (note,) = beside_published({"walker_walk": {"dreamer": group}})
        assert tables == [] and reason in note


def test_a_page_escapes_texts_and_embeds_figures() -> None:
    table = Table(["a<b"], [["<script>"], [None]], "x & y")
    text = page("<title>", [("h2", "<b>"), ("table", table), ("figure", Figure(".png", b"x", "c"))])
    assert "<script>" not in text and "&lt;script&gt;" in text and "a&lt;b" in text
    assert "x &amp; y" in text and "data:image/png;base64,eA==" in text and "None" not in text
