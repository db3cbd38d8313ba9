from __future__ import annotations

from pathlib import Path

from tiny import run_config

from latentplan.inspection.tensorboard_layout import hyperparameters


def test_task_seed_and_size_come_first_in_alphabetical_order(tmp_path: Path) -> None:
    values = hyperparameters(run_config(tmp_path, "seed=3"))
    assert sorted(values)[:3] == ["1 task", "2 seed", "3 size"]
    assert [values[name] for name in sorted(values)[:3]] == ["dummy:pixels", 3, "tiny"]


def test_a_setting_of_null_has_a_value_that_tensorboard_takes(tmp_path: Path) -> None:
    values = hyperparameters(run_config(tmp_path, "obs=state"))
    assert values["behavior.entropy"] == "null"
    assert all(isinstance(x, str | int | float) for x in values.values())
