from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import BOTH, agent_config, random_batch

from latentplan.agent import Agent
from latentplan.cli.main import main
from latentplan.inspection import calibration_report
from latentplan.inspection.calibration import (
    KStepErrors,
    auroc,
    k_step_errors,
    one_step_uncertainty,
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


def artificial_errors() -> KStepErrors:
    """20 windows and 3 steps. Error a rises with the uncertainty, b falls, and c is constant."""
    uncertainty = torch.rand(20, 3, generator=torch.Generator().manual_seed(0)).cumsum(1)
    return KStepErrors(
        uncertainty, {"a": uncertainty**3, "b": -uncertainty, "c": torch.ones(20, 3)}
    )


def test_windows_stay_within_their_episode() -> None:
    """The first environment begins a second episode at row 5. The second one has one episode."""
    first = np.zeros((11, 2), bool)
    first[0], first[5, 0] = True, True
    number = np.arange(22).reshape(11, 2)
    rows = Timestep({"vector": number[..., None]}, number, number, first, first)
    result = windows(rows, 4, 3)
    assert result.reward[:, 0].tolist() == [0, 2 * 5, 1, 2 * 3 + 1, 2 * 6 + 1]
    assert (np.diff(result.reward) == 2).all() and result.obs["vector"].shape == (5, 4, 1)
    assert windows(rows, 12, 3).obs["vector"].shape == (0, 12, 1)


def test_rank_correlation_depends_on_the_order_only() -> None:
    rho = rank_correlations(artificial_errors())
    assert rho["a"] == pytest.approx([1, 1, 1]) and rho["b"] == pytest.approx([-1, -1, -1])
    assert np.isnan(rho["c"]).all()


def test_reliability_bins_rise_with_the_uncertainty() -> None:
    bins = reliability(artificial_errors(), 2, bins=4)["a"]
    assert len(bins["error"]) == 4 and bins["uncertainty"] == sorted(bins["uncertainty"])
    assert bins["error"] == sorted(bins["error"])
    assert np.mean(bins["error"]) == pytest.approx(
        float((artificial_errors().uncertainty[:, 1] ** 3).mean())
    )


def test_auroc_is_the_probability_that_unknown_states_are_more_uncertain() -> None:
    assert auroc(np.array([1.0, 2.0]), np.array([3.0, 4.0])) == 1
    assert auroc(np.array([3.0, 4.0]), np.array([1.0, 2.0])) == 0
    assert auroc(np.array([1.0, 3.0]), np.array([2.0, 4.0])) == 0.75
    assert auroc(np.ones(3), np.ones(4)) == 0.5


def test_errors_and_uncertainty_of_an_agent() -> None:
    torch.manual_seed(0)
    agent = Agent(BOTH, agent_config())
    rows, _ = random_batch(6, 9, BOTH)
    result = k_step_errors(agent, rows, 4)
    assert set(result.errors) == {"latent", "reward", "image", "vector"}
    for x in (result.uncertainty, *result.errors.values()):
        assert x.shape == (6, 5) and x.isfinite().all() and (x >= 0).all()
    assert (result.errors["latent"] <= 1).all()
    assert (result.uncertainty.diff(dim=1) > 0).all()  # a sum over the steps so far
    assert one_step_uncertainty(agent, rows, 4).shape == (6 * 5,)


@pytest.mark.parametrize("field", ["obs", "prev_action", "reward"])
def test_a_row_is_compared_with_the_step_that_arrives_there(field: str) -> None:
    """Step 3 arrives at row context + 2. A change of that row does not affect steps 1 and 2."""
    torch.manual_seed(0)
    agent = Agent(BOTH, agent_config())
    with torch.no_grad():
        for name, x in agent.named_parameters():
            if "reward" not in name:  # this head keeps predicting 0: its bins reach 1e8
                x.add_(0.1 * torch.randn_like(x))
    rows, _ = random_batch(6, 9, BOTH)
    other = rows.map(torch.clone)
    for x in other.obs.values() if field == "obs" else [getattr(other, field)]:
        x[:, 6] = x[:, 6].flip(0) + (field == "reward")
    before, after = [], []
    for values, batch in ((before, rows), (after, other)):
        torch.manual_seed(1)
        result = k_step_errors(agent, batch, 4)
        values += [result.uncertainty, *(result.errors[k] for k in sorted(result.errors))]
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
        }[field]
    )


def test_scalars_are_named_after_the_steps_ahead() -> None:
    named = scalars({"reward": [0.1, 0.2, 0.3, 0.4, 0.5]}, 0.9)
    assert named == {
        "calibration/reward_1": 0.1,
        "calibration/reward_5": 0.5,
        "calibration/auroc": 0.9,
    }


@pytest.mark.parametrize(
    ("rho", "words"),
    [(-0.3, "does not tell"), (0.3, "roughly"), (0.8, "tells well"), (float("nan"), "no verdict")],
)
def test_the_verdict_says_what_the_correlation_means(rho: float, words: str) -> None:
    correlations = {"latent": [0.0, 0.0, 0.0, 0.0, rho], "reward": [0.1] * 5}
    report = {"rank_correlation": correlations, "windows": 30, "auroc": None, "continue": None}
    sentence = calibration_report.verdict(report)
    assert words in sentence and "No held-out episode terminated" in sentence
    assert math.isnan(rho) or f"{rho:.2f}" in sentence


def test_new_rows_are_distinguished_from_replayed_ones(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The uncertainties are given. A reward of -1 marks held-out rows, -2 rows of the variant."""
    pytest.importorskip("matplotlib")
    marks = iter([-1.0, -2.0])
    uncertainty = {-1.0: [2.5, 5.0], -2.0: [5.0, 6.0, 7.0]}
    play = calibration_report.held_out

    def marked(*arguments: Any) -> Timestep:
        rows = play(*arguments)
        return rows._replace(reward=np.full_like(rows.reward, next(marks)))

    def known(agent: Agent, rows: Timestep, context: int) -> np.ndarray:
        return np.array(uncertainty.get(rows.reward.max().item(), [1.0, 2.0, 3.0, 4.0]))

    monkeypatch.setattr(calibration_report, "held_out", marked)
    monkeypatch.setattr(calibration_report, "one_step_uncertainty", known)
    agent, config, _, saved = run_folder.load_agent(run)
    report = calibration_report.calibrate_agent(
        agent, config, saved, run, tmp_path, 2, "dummy:pixels"
    )
    assert report["auroc"] == 1  # all of the variant are above all replayed ones
    assert report["auroc_same_task"] == 0.75  # 2.5 is above two of four, 5 above all


def test_a_run_is_calibrated(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert main(["calibrate", str(run), "--episodes", "3", "--unseen", "dummy:pixels"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == report | json.loads((run / "calibration" / "calibration.json").read_text())
    assert all(len(rho) == 15 for rho in report["rank_correlation"].values())
    assert 0 < report["auroc"] < 1 and report["unseen"] == "dummy:pixels"
    assert 0 < report["auroc_same_task"] < 1
    assert report["verdict"].startswith("The uncertainty ") and "0.5 is chance" in report["verdict"]
    assert (run / "calibration" / "calibration.png").stat().st_size > 5000
    assert list((run / "calibration").glob("events.out.tfevents*"))
    assert main(["calibrate", str(run), "--episodes", "0"]) == 2
    assert main(["calibrate", str(run), "--unseen", "dummy:nothing"]) == 2
    assert main(["calibrate", str(tmp_path / "nowhere")]) == 2
