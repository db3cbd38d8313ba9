"""Whole runs with discrete actions: training, resuming, and each use of a finished run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from test_train import run_differences
from tiny import DISCRETE, EPISODE, VECTOR, WORLD, agent_config, random_batch, run_config

import latentplan
from latentplan.agent import Agent
from latentplan.cli.main import main
from latentplan.config.loading import load
from latentplan.deploy.export import STATE, export
from latentplan.inspection.action_names import name_actions
from latentplan.runs import checkpoint
from latentplan.training.session import train
from latentplan.types import EnvSpec, UserError

TASK = "task=dummy:discrete"
SEARCH = ("plan.candidates=6", "plan.search=cross_entropy", "plan.imagine_fraction=0")


@pytest.fixture(scope="module")
def discrete_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with images and state, and with discrete actions."""
    folder = tmp_path_factory.mktemp("discrete") / "run"
    more = ("obs=both", "plan.candidates=3", f"steps={2 * EPISODE}", f"log.inspect_every={EPISODE}")
    return train(run_config(folder, TASK, *more))


@pytest.mark.parametrize(
    "extra",
    [
        ["plan.candidates=3", "plan.imagine_fraction=0.5", "distill.weight=1"],
        [*SEARCH, "plan.elites=2", "distill.weight=1", "distill.stored=true"],
        ["ablation=mpdp_shared", "mpdp.horizon=2", "behavior.target_entropy=0.5"],
    ],
    ids=["planned", "searched", "mpdp"],
)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, extra: list[str]) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    train(run_config(whole, TASK, f"steps={4 * EPISODE}", "log.inspect_every=0", *extra))
    for frames in (2 * EPISODE, 4 * EPISODE):
        train(run_config(halves, TASK, f"steps={frames}", "log.inspect_every=0", *extra))
    assert checkpoint.load(whole / "checkpoint.pt")["updates"] > 20
    assert run_differences(whole, halves) == []


def test_a_finished_run_is_evaluated_imagined_diagnosed_and_calibrated(
    discrete_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(discrete_run), "--episodes", "2"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert len(result["returns"]) == 2 and result["lengths"] == [EPISODE] * 2
    assert main(["diagnose", str(discrete_run), "--episodes", "2"]) == 0
    assert "standard deviation" in capsys.readouterr().out
    assert main(["imagine", str(discrete_run)]) == 0


def test_a_loaded_agent_gives_the_environment_a_number(discrete_run: Path) -> None:
    agent = latentplan.load(discrete_run)
    assert agent.spec.action_groups == (5,) and agent.spec.action_names[1] == "right"
    obs = {"image": np.zeros((16, 16, 3), np.uint8), "vector": np.ones(2, np.float32)}
    action = agent.act(obs)
    assert action.shape == (5,) and sorted(action) == [0, 0, 0, 0, 1]
    command = agent.to_env(action)
    assert command == action.argmax() and command.dtype == np.int64 and command.shape == ()
    agent.act(obs, executed=np.eye(5)[3])
    with pytest.raises(ValueError, match="one-hot"):
        agent.act(obs, executed=np.full(5, 0.2))


def test_onnx_gives_the_number_of_the_agents_action(discrete_run: Path, tmp_path: Path) -> None:
    result = export(discrete_run, tmp_path / "policy.onnx")
    assert result["outputs"]["index"] == "int64 1x1" and result["action_groups"] == (5,)
    session = onnxruntime.InferenceSession(tmp_path / "policy.onnx")
    agent, rng = latentplan.load(discrete_run), np.random.default_rng(0)
    world, drawn = agent.config.world, torch.Generator().manual_seed(0)
    shapes = (1, 5), (1, world.deter), (1, world.stoch, world.classes)
    state = {k: np.zeros(shape, np.float32) for k, shape in zip(STATE, shapes, strict=True)}
    for _ in range(8):
        obs = {
            "image": rng.integers(256, size=(16, 16, 3), dtype=np.uint8),
            "vector": rng.normal(size=2).astype(np.float32),
        }
        rows = {name: x[None] for name, x in obs.items()}
        uniform = torch.rand(1, world.stoch, generator=drawn).numpy()
        *following, index = session.run(None, {**rows, **state, "uniform": uniform})
        state = dict(zip(STATE, following, strict=True))
        assert index.tolist() == [[int(agent.to_env(agent.act(obs)))]]


def test_an_action_is_named_by_the_environment_or_by_its_number() -> None:
    actions = torch.tensor([[1.0, 0, 0, 1, 0], [0, 1, 0, 0, 1]])
    assert name_actions(DISCRETE, actions) == ["action 0 1", "action 1 2"]
    one = EnvSpec({}, 2, 1, action_groups=(2,), action_names=("NOOP", "FIRE"))
    assert name_actions(one, torch.tensor([[0.0, 1.0]])) == ["FIRE"]
    assert name_actions(one, torch.zeros(1, 2)) == [""], "before the first action"
    assert name_actions(one._replace(action_groups=(), action_names=()), actions) == []


def test_auto_is_the_score_function_for_discrete_actions() -> None:
    config = agent_config(gradient="auto")
    assert Agent(DISCRETE, config).config.behavior.gradient == "reinforce"
    continuous = DISCRETE._replace(action_groups=())
    assert Agent(continuous, config).config.behavior.gradient == "pathwise"


def test_from_state_the_bonus_of_the_entropy_is_that_of_the_gradient() -> None:
    config = load([], ["obs=state", "train.precision=float32"])
    assert config.behavior.entropy is None
    config = replace(config, world=WORLD, behavior=replace(config.behavior, units=8, bins=41))
    for spec, bonus in ((VECTOR, 0.001), (DISCRETE, 0.004)):
        assert float(Agent(spec, config).temperature.value) == pytest.approx(bonus)
    asked = replace(config, behavior=replace(config.behavior, entropy=0.01))
    assert float(Agent(DISCRETE, asked).temperature.value) == pytest.approx(0.01)


def test_the_target_of_the_entropy_is_a_fraction_of_the_largest() -> None:
    agent = Agent(DISCRETE, agent_config(target_entropy=0.5))
    assert agent.temperature.target == pytest.approx(0.5 * np.log(6))
    with pytest.raises(UserError, match="between 0 and 1"):
        Agent(DISCRETE, agent_config(target_entropy=-1.0))


@pytest.mark.parametrize("gradient", ["reinforce", "pathwise"])
def test_an_update_moves_the_actor(gradient: str) -> None:
    torch.manual_seed(0)
    agent = Agent(DISCRETE, agent_config(gradient=gradient))
    before = [x.clone() for x in agent.actor.parameters()]
    metrics = agent.update(*random_batch(2, 6, DISCRETE))
    assert all(x.isfinite().all() for x in metrics.values())
    assert any((x != y).any() for x, y in zip(agent.actor.parameters(), before, strict=True))
