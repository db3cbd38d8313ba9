"""What the world model learns from a batch, term by term, and what it measures."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tiny import VECTOR, random_batch, world_config
from torch import Tensor
from torch.nn import functional

from latentplan.nn.distributions import symlog
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
    surprise = lambda logit: math.log1p(math.exp(-logit))  # noqa: E731
    expected = (7 * surprise(2.0) + surprise(-2.0)) / 8
    assert model.loss(batch, episode).terms["con"].item() == pytest.approx(expected)


def test_bonuses_are_measured_in_the_95th_percentile(monkeypatch: pytest.MonkeyPatch) -> None:
    model = world()
    monkeypatch.setattr(model, "disagreement", lambda probs: torch.arange(float(probs.shape[1])))
    found = model.loss(*random_batch(3, 7))  # rows 0 .. 20
    assert float(found.high_uncertainty) == pytest.approx(19.0)
    assert float(found.metrics["train/model/uncertainty"]) == pytest.approx(10.0)


def test_probes_measure_no_transition_into_a_reset() -> None:
    model = world(uncertainty="probes")
    batch, _ = random_batch(2, 5)
    batch.is_first[1, 3] = True
    latent, _ = model.observe(batch)
    _, found = model._probe_loss(model.probes, latent, batch, torch.ones(3, 2, 5, dtype=torch.bool))
    assert torch.equal(found.isnan().view(2, 4), batch.is_first[:, 1:])


def test_probes_are_asked_about_the_state_left_and_the_bounded_action() -> None:
    model = world(uncertainty="probes")
    latent, action = Latent(torch.randn(6, 16).tanh(), torch.rand(6, 3, 4)), 3 * torch.randn(6, 2)
    assert (action.abs() > 1).any()
    expected = model.probes.uncertainty(model.features(latent), action.clamp(-1, 1))
    torch.testing.assert_close(model.step(latent, action).uncertainty, expected)


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_states_are_decoded_against_their_own_rows(
    share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A decoder that is right has no error, whichever rows it is asked about."""
    model, seen = world(decode_fraction=share), []

    def decode(features: Tensor) -> dict[str, Tensor]:
        seen.append(len(features))
        return {"vector": features[:, :3]}

    monkeypatch.setattr(model, "_decode", decode)
    x = torch.randn(10, 3)
    features = functional.pad(symlog(x), (0, model.feature_size - 3))
    assert float(model._reconstruction(features, {"vector": x})["vector"]) < 1e-10
    assert float(model._reconstruction(features, {"vector": x.flip(0)})["vector"]) > 0.1
    assert seen == 2 * [round(10 * share)]
