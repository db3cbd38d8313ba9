"""Agents on another device than the CPU, without needing a GPU.

The device "meta" keeps the shapes of tensors and no values. Combining its tensors with a tensor
that was made on the CPU by mistake is an error. Reading a value, which would wait for a GPU, is
also an error.
"""

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


def agent_on_meta(overrides: list[str]) -> Agent:
    config = load([], ["size=tiny", "obs=both", "train.precision=float32", *overrides])
    agent = Agent(BOTH, config, DEVICE)
    agent.world.autocast = contextlib.nullcontext  # autocast does not support this device
    # These two read values, once at the start and once at the end of an update.
    agent.world.fit_normalizers = lambda obs: None
    agent._require_finite = lambda terms: None
    return agent


@pytest.mark.parametrize("overrides", CASES, ids=" ".join)
def test_an_update_stays_on_its_device_and_reads_no_values(overrides: list[str]) -> None:
    agent = agent_on_meta(overrides)
    metrics = agent.update(*random_rows(BOTH, 4, 8, DEVICE))
    assert {x.device for x in metrics.values()} == {DEVICE}


@pytest.mark.parametrize("overrides", CASES, ids=" ".join)
def test_actions_are_on_the_device_of_the_agent(overrides: list[str]) -> None:
    agent = agent_on_meta(overrides)
    row = random_rows(BOTH, 3, 1, DEVICE)[0].map(lambda x: x[:, 0])
    carry = agent.initial(3)
    actions = [agent.explore(row, carry)[0], *(agent.act(row, carry, x)[0] for x in MODES)]
    assert all(x.device == DEVICE and x.shape == (3, 2) for x in actions)


MODES = ("mean", "sample", "planner")


@pytest.mark.parametrize("mistake", ["made on the CPU", "value read"])
def test_these_tests_detect_mistakes(mistake: str) -> None:
    agent = agent_on_meta(["ablation=none"])
    original = agent.world.features

    def features(latent: object) -> torch.Tensor:
        result = original(latent)
        if mistake == "value read":
            return result * float(result.detach().mean())
        return result + torch.zeros(result.shape)

    agent.world.features = features
    with pytest.raises(RuntimeError):
        agent.update(*random_rows(BOTH, 4, 8, DEVICE))
