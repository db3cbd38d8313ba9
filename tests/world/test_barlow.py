from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import BOTH, agent_config, random_batch, run_config, world_config

from latentplan.agent import Agent
from latentplan.config.loading import load
from latentplan.inspection.open_loop import make_open_loop_film
from latentplan.training.session import train
from latentplan.types import UserError
from latentplan.world.barlow import Barlow, barlow_loss
from latentplan.world.model import WorldModel


def test_the_loss_of_equal_decorrelated_dimensions_is_zero() -> None:
    x = torch.linalg.qr(torch.randn(200, 4) - torch.randn(200, 4).mean(0))[0]
    x = torch.linalg.qr(x - x.mean(0))[0]
    assert float(barlow_loss(x, 3 * x + 5)) == pytest.approx(0, abs=5e-3)
    assert float(barlow_loss(x, -x)) == pytest.approx(4 * 4, rel=0.02)  # (-1 - 1)^2 each


def test_the_loss_of_correlated_dimensions_has_the_small_weight() -> None:
    x = torch.randn(500, 1)
    twice = torch.cat([x, x], 1)
    assert float(barlow_loss(twice, twice)) == pytest.approx(2 * 5e-4, rel=0.1)


def test_a_constant_dimension_causes_no_division_by_zero() -> None:
    x = torch.cat([torch.randn(50, 1), torch.ones(50, 1)], 1).requires_grad_()
    loss = barlow_loss(x, x.detach())
    loss.backward()
    assert float(loss) == pytest.approx(1, abs=0.01) and x.grad.isfinite().all()


def test_the_target_learns_nothing() -> None:
    features, embed = torch.randn(20, 3, requires_grad=True), torch.randn(20, 5, requires_grad=True)
    Barlow(3, 5)(features, embed).backward()
    assert features.grad.abs().sum() > 0 and embed.grad is None


def test_the_decoder_is_a_probe() -> None:
    """With Barlow Twins, reconstruction errors train only the decoder itself."""
    torch.manual_seed(0)
    batch, episode = random_batch(4, 6, BOTH)

    def touched(representation: str, terms: tuple[str, ...]) -> set[str]:
        world = WorldModel(BOTH, world_config(representation=representation))
        losses = world.loss(batch, episode).terms
        sum(losses[name] for name in terms).backward()
        return {name.split(".")[0] for name, p in world.named_parameters() if p.grad is not None}

    reconstruction = ("image", "vector")
    assert touched("barlow", reconstruction) == {"decoder"}
    assert touched("decoder", reconstruction) == {"decoder", "encoder", "rssm"}
    assert touched("barlow", ("barlow",)) == {"barlow", "encoder", "rssm"}


def test_features_learn_to_predict_the_embedding() -> None:
    """On a fixed batch of random rows, updates lower the Barlow loss."""
    torch.manual_seed(0)
    config = agent_config()
    config = replace(config, world=replace(config.world, representation="barlow"))
    agent = Agent(BOTH, config)
    batch, episode = random_batch(4, 8, BOTH)
    losses = [float(agent.update(batch, episode)["train/loss/barlow"]) for _ in range(60)]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


def test_a_run_without_a_decoder_is_trained_and_filmed(tmp_path: Path) -> None:
    ablation = load([], ["ablation=barlow"]).world
    assert ablation.representation == "barlow" and ablation.decode_fraction < 0.1
    run = tmp_path / "run"
    train(run_config(run, "obs=pixels", "world.representation=barlow", "log.inspect_every=128"))
    assert list((run / "videos").glob("imagination-open_loop-*.gif"))
    torch.manual_seed(0)
    agent = Agent(BOTH, replace(agent_config(), world=world_config(representation="barlow")))
    assert make_open_loop_film(agent, random_batch(2, 6, BOTH)[0], 3).shape[0] == 6
    with pytest.raises(UserError, match="representation"):
        load([], ["world.representation=twins"])
