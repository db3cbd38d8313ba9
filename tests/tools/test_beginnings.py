"""The runs that begin from something are valid, and their report has all of them."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import beginnings
import pytest

from latentplan.config.loading import load
from latentplan.types import UserError


def test_every_run_is_valid_and_shown(tmp_path: Path) -> None:
    runs = beginnings.settings(Path("runs/begin"))
    configs = {name: load([], items) for name, items in runs.items()}
    assert all(config.run_dir == f"runs/begin/{name}" for name, config in configs.items())
    shown = [x for groups in beginnings.PANELS.values() for names in groups.values() for x in names]
    assert set(runs) - set(shown) == {"balance-s0"} and len(shown) == len(set(shown))
    order = list(runs)
    for name, config in configs.items():
        for source in (config.train.init_from, config.train.offline):
            if source:  # the run that it begins from is trained before
                needed = source.removeprefix("runs/begin/").split("/")[0]
                assert order.index(needed) < order.index(name)
    one, other = configs["from-recorder-s1"], configs["fresh-s1"]
    assert one.steps == other.steps and one.seed == other.seed and one.eval == other.eval


def test_the_report_has_the_evaluations_of_every_run(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    folder, out = tmp_path / "runs", tmp_path / "report"
    with pytest.raises(UserError):
        beginnings.report(folder, out)
    names = list(beginnings.settings(folder))
    for name in names:
        (folder / name).mkdir(parents=True)
        for file in ("config.yaml", "run.json", "metrics.jsonl"):
            shutil.copy(run / file, folder / name)
    beginnings.report(folder, out)
    with out.with_suffix(".csv").open() as file:
        assert [*dict.fromkeys(row["run"] for row in csv.DictReader(file))] == names
    described = json.loads(out.with_suffix(".json").read_text())
    assert [x["run"] for x in described] == names
    assert {x["sessions"][0]["command"][0] for x in described} == {"latentplan"}
    assert out.with_suffix(".png").stat().st_size > 1000
