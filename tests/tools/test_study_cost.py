"""The benchmark of what the command that runs a study costs by itself."""

from __future__ import annotations

import sys

import pytest
import study_cost


def test_a_command_is_measured_while_it_runs() -> None:
    code, rows = study_cost.sample([sys.executable, "-c", "import time; time.sleep(1)"], 0.2)
    assert code == 0 and len(rows) >= 3 and all(row["rss_mib"] > 0 for row in rows[:3])


def test_growth_is_that_of_the_second_half() -> None:
    rows = [
        {"seconds": x, "rss_mib": 400 + max(0, 50 - x), "cpu_seconds": 3 + 0.02 * x, "runs": 2}
        for x in range(200)
    ]
    flat = study_cost.summary(rows)
    assert abs(flat["rss_mib_per_hour"]) < 0.1 and flat["cpu_share"] == pytest.approx(0.02)
    for row in rows:
        row["rss_mib"] += row["seconds"] / 36
    assert study_cost.summary(rows)["rss_mib_per_hour"] == pytest.approx(100)
