from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import BOTH, agent_config, random_batch

from latentplan.agent import Agent
from latentplan.cli.main import main
from latentplan.inspection import calibration_report as calibrate
from latentplan.inspection.calibration import (
    KStep,
    auroc,
    k_step,
    one_step,
    rank_correlations,
    reliability,
    scalars,
    windows,
)
from latentplan.runs import run_folder
from latentplan.types import Timestep


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("run") / "finished"
    settings = ["task=dummy:pixels", "obs=both", "size=tiny", "steps=600", "env.workers=false"]
    assert main(["train", *settings, f"run_dir={folder}", "eval.video=false"]) == 0
    return folder


def made_up() -> KStep:
    """20 windows, 3 steps: one error follows the uncertainty, one opposes it, one is constant."""
    fear = torch.rand(20, 3, generator=torch.Generator().manual_seed(0)).cumsum(1)
    return KStep(fear, {"a": fear**3, "b": -fear, "c": torch.ones(20, 3)})


def test_windows_stay_within_their_episode() -> None:
    """Two environments; the first one's second episode begins at row 5, the other's never."""
    first = np.zeros((11, 2), bool)
    first[0], first[5, 0] = True, True
    number = np.arange(22).reshape(11, 2)
    rows = Timestep({"vector": number[..., None]}, number, number, first, first)
    found = windows(rows, 4, 3)
    assert found.reward[:, 0].tolist() == [0, 2 * 5, 1, 2 * 3 + 1, 2 * 6 + 1]
    assert (np.diff(found.reward) == 2).all() and found.obs["vector"].shape == (5, 4, 1)
    assert windows(rows, 12, 3).obs["vector"].shape == (0, 12, 1)


def test_rank_correlation_sees_order_and_nothing_else() -> None:
    rho = rank_correlations(made_up())
    assert rho["a"] == pytest.approx([1, 1, 1]) and rho["b"] == pytest.approx([-1, -1, -1])
    assert np.isnan(rho["c"]).all()


def test_reliability_bins_rise_with_the_uncertainty() -> None:
    bins = reliability(made_up(), 2, bins=4)["a"]
    assert len(bins["error"]) == 4 and bins["uncertainty"] == sorted(bins["uncertainty"])
    assert bins["error"] == sorted(bins["error"])
    assert np.mean(bins["error"]) == pytest.approx(float((made_up().uncertainty[:, 1] ** 3).mean()))


def test_auroc_is_the_probability_of_the_right_order() -> None:
    assert auroc(np.array([1.0, 2.0]), np.array([3.0, 4.0])) == 1
    assert auroc(np.array([3.0, 4.0]), np.array([1.0, 2.0])) == 0
    assert auroc(np.array([1.0, 3.0]), np.array([2.0, 4.0])) == 0.75
    assert auroc(np.ones(3), np.ones(4)) == 0.5


def test_errors_and_uncertainty_of_an_agent() -> None:
    torch.manual_seed(0)
    agent = Agent(BOTH, agent_config())
    rows, _ = random_batch(6, 9, BOTH)
    result = k_step(agent, rows, 4)
    assert set(result.errors) == {"latent", "reward", "image", "vector"}
    for x in (result.uncertainty, *result.errors.values()):
        assert x.shape == (6, 5) and x.isfinite().all() and (x >= 0).all()
    assert (result.errors["latent"] <= 1).all()
    assert (result.uncertainty.diff(dim=1) > 0).all()  # a sum over the steps so far
    assert one_step(agent, rows, 4).shape == (6 * 5,)


@pytest.mark.parametrize("what", ["obs", "prev_action", "reward"])
def test_a_row_is_compared_with_the_step_that_arrives_there(what: str) -> None:
    """Row context + 2 is that of step 3: whatever it holds says nothing about steps 1 and 2."""
    torch.manual_seed(0)
    agent = Agent(BOTH, agent_config())
    with torch.no_grad():
        for name, x in agent.named_parameters():
            if "reward" not in name:  # it predicts 0: its bins reach 1e8
                x.add_(0.1 * torch.randn_like(x))
    rows, _ = random_batch(6, 9, BOTH)
    other = rows.map(torch.clone)
    for x in other.obs.values() if what == "obs" else [getattr(other, what)]:
        x[:, 6] = x[:, 6].flip(0) + (what == "reward")
    before, after = [], []
    for found, batch in ((before, rows), (after, other)):
        torch.manual_seed(1)
        result = k_step(agent, batch, 4)
        found += [result.uncertainty, *(result.errors[k] for k in sorted(result.errors))]
    same = [torch.isclose(*x, rtol=1e-5).all(0).tolist() for x in zip(before, after, strict=True)]
    named = dict(zip(("uncertainty", *sorted(result.errors)), same, strict=True))
    assert all(x[:2] == [True, True] for x in same)
    changed = {name for name, x in named.items() if not x[2]}
    assert (
        changed
        == {
            "obs": {"image", "latent", "vector"},
            "prev_action": {"uncertainty", "image", "latent", "vector"},
            "reward": {"reward"},
        }[what]
    )


def test_scalars_are_named_after_the_steps_ahead() -> None:
    named = scalars({"reward": [0.1, 0.2, 0.3, 0.4, 0.5]}, 0.9)
    assert named == {
        "calibration/reward_1": 0.1,
        "calibration/reward_5": 0.5,
        "calibration/auroc": 0.9,
    }


def test_new_rows_are_distinguished_from_replayed_ones(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With known numbers; whose they are is told by rewards of -1 (held out) and -2 (variant)."""
    pytest.importorskip("matplotlib")
    marks = iter([-1.0, -2.0])
    uncertainty = {-1.0: [2.5, 5.0], -2.0: [5.0, 6.0, 7.0]}
    play = calibrate.held_out

    def marked(*arguments: Any) -> Timestep:
        rows = play(*arguments)
        return rows._replace(reward=np.full_like(rows.reward, next(marks)))

    def known(agent: Agent, rows: Timestep, context: int) -> np.ndarray:
        return np.array(uncertainty.get(rows.reward.max().item(), [1.0, 2.0, 3.0, 4.0]))

    monkeypatch.setattr(calibrate, "held_out", marked)
    monkeypatch.setattr(calibrate, "one_step", known)
    agent, config, _, saved = run_folder.load_agent(run)
    report = calibrate.calibrate_agent(agent, config, saved, run, tmp_path, 2, "dummy:pixels")
    assert report["auroc"] == 1  # whatever is above all that was replayed
    assert report["auroc_same_task"] == 0.75  # 2.5 is above two of the four, 5 above all


def test_a_run_is_calibrated(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert main(["calibrate", str(run), "--episodes", "3", "--unseen", "dummy:pixels"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == report | json.loads((run / "calibration" / "calibration.json").read_text())
    assert all(len(rho) == 15 for rho in report["rank_correlation"].values())
    assert 0 < report["auroc"] < 1 and report["unseen"] == "dummy:pixels"
    assert 0 < report["auroc_same_task"] < 1
    assert (run / "calibration" / "calibration.png").stat().st_size > 5000
    assert list((run / "calibration").glob("events.out.tfevents*"))
    assert main(["calibrate", str(run), "--episodes", "0"]) == 2
    assert main(["calibrate", str(run), "--unseen", "dummy:nothing"]) == 2
    assert main(["calibrate", str(tmp_path / "nowhere")]) == 2
