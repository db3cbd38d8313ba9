"""The loss terms of the world model, and its uncertainty."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tiny import VECTOR, random_batch, world_config
from torch import Tensor
from torch.nn import functional

from latentplan.types import Latent
from latentplan.world.model import WorldModel


def world(**changes: Any) -> WorldModel:
    torch.manual_seed(0)
    return WorldModel(VECTOR, world_config(**changes))


def test_continuation_is_learned_from_terminal_rows() -> None:
    model = world()
    batch, episode = random_batch(2, 4)
    batch.is_terminal[0, 3] = True
    with torch.no_grad():
        model.cont.output.weight.zero_()
        model.cont.output.bias.fill_(2.0)
    loss_at = lambda logit: math.log1p(math.exp(-logit))  # noqa: E731
    expected = (7 * loss_at(2.0) + loss_at(-2.0)) / 8
    assert model.loss(batch, episode).terms["con"].item() == pytest.approx(expected)


def test_high_uncertainty_is_the_95th_percentile(monkeypatch: pytest.MonkeyPatch) -> None:
    model = world()
    monkeypatch.setattr(model, "disagreement", lambda probs: torch.arange(float(probs.shape[1])))
    loss = model.loss(*random_batch(3, 7))  # rows 0 .. 20
    assert float(loss.high_uncertainty) == pytest.approx(19.0)
    assert float(loss.metrics["train/model/uncertainty"]) == pytest.approx(10.0)


def test_a_transition_into_a_reset_has_no_uncertainty() -> None:
    model = world(uncertainty="probes")
    batch, _ = random_batch(2, 5)
    batch.is_first[1, 3] = True
    latent, _ = model.observe(batch)
    mask = torch.ones(3, 2, 5, dtype=torch.bool)
    _, uncertainty = model._probe_loss(model.probes, latent, batch, mask)
    assert torch.equal(uncertainty.isnan().view(2, 4), batch.is_first[:, 1:])


def test_probes_get_the_state_before_the_step_and_the_clipped_action() -> None:
    model = world(uncertainty="probes")
    latent, action = Latent(torch.randn(6, 16).tanh(), torch.rand(6, 3, 4)), 3 * torch.randn(6, 2)
    assert (action.abs() > 1).any()
    expected = model.probes.uncertainty(model.features(latent), action.clamp(-1, 1))
    torch.testing.assert_close(model.step(latent, action).uncertainty, expected)


@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_states_are_decoded_against_their_own_rows(
    fraction: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exact decoder has no error, also when only some rows are decoded."""
    model, decoded_rows = world(decode_fraction=fraction), []

    def decode(features: Tensor) -> dict[str, Tensor]:
        decoded_rows.append(len(features))
        return {"vector": features[:, :3]}

    monkeypatch.setattr(model, "_decode", decode)
    x = torch.randn(10, 3)
    features = functional.pad(x, (0, model.feature_size - 3))
    assert float(model._reconstruction(features, {"vector": x})["vector"]) < 1e-10
    assert float(model._reconstruction(features, {"vector": x.flip(0)})["vector"]) > 0.1
    assert decoded_rows == 2 * [round(10 * fraction)]
