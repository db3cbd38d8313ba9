"""Agents on another device than the CPU. Where there is no GPU, on one that keeps shapes and no
numbers ("meta"): a tensor that was made on the CPU by mistake cannot be combined with its own, and
whoever asks for a number, which on a GPU means to wait for it, gets an error."""

from __future__ import annotations

import contextlib

import pytest
import torch
from tiny import BOTH

from latentplan.agent import Agent
from latentplan.bench.parts import random_rows
from latentplan.config.loading import load

DEVICE = torch.device("meta")
CASES = [
    *(["ablation=" + x] for x in ("none", "coplanner", "latentplan", "mpdp", "barlow")),
    *(["ablation=coplanner", f"world.uncertainty={x}"] for x in ("probes", "std", "kl_rest")),
    ["ablation=mpdp_shared", "behavior.target_entropy=-1"],
    ["ablation=distill_only", "behavior.gradient=pathwise"],
    ["size=cpu", "ablation=coplanner_faithful"],
]


def elsewhere(overrides: list[str]) -> Agent:
    config = load([], ["size=tiny", "obs=both", "train.precision=float32", *overrides])
    agent = Agent(BOTH, config, DEVICE)
    agent.world.autocast = contextlib.nullcontext  # autocast knows no such device
    # These two ask for numbers, once at the start and once at the end of an update.
    agent.world.fit_image_normalizers = lambda obs: None
    agent._require_finite = lambda terms: None
    return agent


@pytest.mark.parametrize("overrides", CASES, ids=" ".join)
def test_an_update_stays_on_its_device_and_waits_for_nothing(overrides: list[str]) -> None:
    agent = elsewhere(overrides)
    metrics = agent.update(*random_rows(BOTH, 4, 8, DEVICE))
    assert {x.device for x in metrics.values()} == {DEVICE}


@pytest.mark.parametrize("overrides", CASES, ids=" ".join)
def test_decisions_stay_on_their_device(overrides: list[str]) -> None:
    agent = elsewhere(overrides)
    row = random_rows(BOTH, 3, 1, DEVICE)[0].map(lambda x: x[:, 0])
    carry = agent.initial(3)
    actions = [agent.explore(row, carry)[0], *(agent.act(row, carry, x)[0] for x in MODES)]
    assert all(x.device == DEVICE and x.shape == (3, 2) for x in actions)


MODES = ("mean", "sample", "planner")


@pytest.mark.parametrize("mistake", ["made elsewhere", "asked for"])
def test_a_mistake_is_noticed(mistake: str) -> None:
    agent = elsewhere(["ablation=none"])
    real = agent.world.features

    def features(latent: object) -> torch.Tensor:
        found = real(latent)
        if mistake == "asked for":
            return found * float(found.detach().mean())
        return found + torch.zeros(found.shape)

    agent.world.features = features
    with pytest.raises(RuntimeError):
        agent.update(*random_rows(BOTH, 4, 8, DEVICE))
