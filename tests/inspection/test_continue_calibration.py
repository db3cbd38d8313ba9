"""The calibration of the predicted continue, on problems whose probabilities are known."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from latentplan.inspection.continue_calibration import (
    AHEAD,
    calibrate_continue,
    continue_reliability,
    continue_verdict,
    predicted_continues,
)
from latentplan.types import Latent, Prediction, StepNoise, Timestep


class KnownRisk:
    """A world in which an action is the probability that the episode survives it.

    The latent state is the last action, and terminal rows cannot be told from others.
    """

    config = SimpleNamespace(members=3)

    def __init__(self, sharpness: float = 1.0) -> None:
        self.sharpness = sharpness

    def initial(self, n: int) -> Latent:
        return Latent(torch.full((n, 1), 0.9), torch.zeros(n, 1, 1))

    def filter(self, row: Timestep, latent: Latent) -> Latent:
        return latent._replace(deter=row.prev_action)

    def features(self, latent: Latent) -> Tensor:
        return latent.deter

    def outcome(self, features: Tensor) -> tuple[Tensor, Tensor]:
        logits = torch.logit(features.squeeze(-1), 1e-6)
        return torch.zeros_like(logits), torch.sigmoid(self.sharpness * logits)

    def draw_noise(self, n: int, horizon: int) -> StepNoise:
        return StepNoise(None, torch.zeros(horizon, n, 1))

    def step_unmeasured(self, latent: Latent, action: Tensor, noise: Any) -> Prediction:
        following = latent._replace(deter=action)
        return Prediction(following, *self.outcome(action), None)


def agent(sharpness: float = 1.0) -> Any:
    return SimpleNamespace(world=KnownRisk(sharpness), device=torch.device("cpu"))


def played(rows: int = 2500, seed: int = 0, safe: bool = False) -> Timestep:
    """Rows (T, 1) of episodes that end by chance, after an action that is the chance to survive."""
    rng = np.random.default_rng(seed)
    action = rng.beta(4, 0.6, (rows, 1, 1)).astype(np.float32)
    first, terminal = np.zeros((2, rows, 1), bool)
    for t in range(rows):
        first[t] = t == 0 or terminal[t - 1]
        if first[t]:
            action[t] = 1
        terminal[t] = not safe and rng.uniform() > action[t]
    zero = np.zeros((rows, 1), np.float32)
    return Timestep({"vector": zero[..., None]}, action, zero, first, terminal)


@pytest.mark.parametrize(
    ("sharpness", "words"), [(1.0, "calibrated"), (3.0, "too sure"), (0.4, "not sure enough")]
)
def test_calibrated_and_overconfident_predictions_are_told_apart(
    sharpness: float, words: str
) -> None:
    result = calibrate_continue(agent(sharpness), played())
    assert result is not None and list(result) == [str(k) for k in AHEAD]
    assert f"is {words}" in continue_verdict(result)
    for x in result.values():
        assert (x["p_value"] > 0.01) == (sharpness == 1)
        assert min(x["ends"], x["predicted_ends"]) > 20


def test_a_prediction_is_compared_with_the_row_that_it_is_about() -> None:
    rows = played(300)
    for k, (predicted, continued) in predicted_continues(agent(), rows).items():
        episode = rows.is_first[:, 0].cumsum()
        about = [t for t in range(k, 300) if episode[t] == episode[t - k]]
        np.testing.assert_allclose(predicted, rows.prev_action[about, 0, 0], atol=1e-5)
        assert continued.tolist() == (~rows.is_terminal[about, 0]).tolist()


def test_the_bins_hold_the_share_of_rows_that_continued() -> None:
    predicted = np.array([0.05, 0.05, 0.85, 0.85, 0.85, 0.85])
    continued = np.array([False, True, True, True, True, False])
    result = continue_reliability(predicted, continued)
    assert result["bins"]["predicted"] == pytest.approx([0.05, 0.85])
    assert result["bins"]["happened"] == pytest.approx([0.5, 0.75])
    assert result["bins"]["rows"] == [2, 4] and result["ends"] == 2
    assert result["predicted_ends"] == pytest.approx(2.5)
    assert result["mismatch"] == pytest.approx((0.9 + 0.4) / 2.5)
    assert result["overconfidence"] == pytest.approx(0.9 + 0.4)


def test_too_few_ends_and_none_have_no_verdict() -> None:
    assert "No held-out episode terminated" in continue_verdict(
        calibrate_continue(agent(), played(50, safe=True))
    )
    few = continue_reliability(np.full(20, 0.9), np.arange(20) > 0)
    assert "too few" in continue_verdict({"0": few})
