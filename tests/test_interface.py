"""The Python interface: ``latentplan.train``, ``evaluate``, ``load``, ``make_env``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny import run_config

import latentplan
from latentplan.config.loading import as_config


def test_train_evaluate_and_load(tmp_path: Path) -> None:
    rows: list[dict[str, float]] = []
    run = latentplan.train(run_config(tmp_path / "run", "steps=128"), on_log=rows.append)
    assert run == tmp_path / "run"
    assert [row["step"] for row in rows] == sorted({row["step"] for row in rows})
    assert rows[-1]["step"] == 128 and "episode/eval_score" in rows[-1]

    result = latentplan.evaluate(run, episodes=2, device="cpu")
    assert len(result["returns"]) == 2 and result["frames"] == 128

    agent = latentplan.load(run)
    with latentplan.make_env(agent.config) as env:
        row, _ = env.reset()
        action = agent.act({name: values[0] for name, values in row.obs.items()})
    assert action.shape == (2,) and np.isfinite(action).all()


def test_a_configuration_is_given_as_values_or_as_typed_items() -> None:
    nested = {"task": "walker_walk", "size": "tiny", "env": {"repeat": 3}, "plan.horizon": 5}
    typed = ["task=walker_walk", "size=tiny", "env.repeat=3", "plan.horizon=5"]
    config = latentplan.load_config(overrides=typed)
    assert isinstance(config, latentplan.Config)
    assert as_config(nested) == as_config(typed) == as_config(config) == config


@pytest.mark.parametrize("settings", [{"tsak": "walker_walk"}, {"env": {"count": 2}}])
def test_mistakes_are_user_errors(settings: dict[str, object]) -> None:
    with pytest.raises(latentplan.UserError, match=r"task|env\.num_envs"):
        latentplan.train(settings)


def test_every_public_name_exists() -> None:
    assert all(hasattr(latentplan, name) for name in latentplan.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        latentplan.nothing  # noqa: B018
