"""The loops of training and evaluation: carries, counters, seeds and checkpoints."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from environments import make
from tiny import VECTOR, agent_config, record_results, run_config

import latentplan.training.loop
from latentplan.agent import Agent
from latentplan.data.replay import Replay
from latentplan.envs import VectorEnv, make_eval_env, make_train_env
from latentplan.evaluation.episodes import run_episodes
from latentplan.inspection.curves import read_metrics
from latentplan.runs import checkpoint, run_folder
from latentplan.runtime.device import pick_device
from latentplan.training.compiling import make_agent
from latentplan.training.loop import Trainer
from latentplan.training.session import train
from latentplan.types import Latent, PlanTarget


def record_carries(patch: pytest.MonkeyPatch, name: str) -> list[tuple[Latent, Latent]]:
    """The carry that every call of a method of the agent received, and the carry it returned."""
    original, carries = getattr(Agent, name), []

    def call(agent: Agent, row: object, carry: Latent, *rest: object) -> tuple:
        result = original(agent, row, carry, *rest)
        carries.append((carry, result[1]))
        return result

    patch.setattr(Agent, name, call)
    return carries


def are_passed_on(carries: list[tuple[Latent, Latent]]) -> bool:
    """Whether every call received the carry that the call before it returned."""
    return len(carries) > 2 and all(a[1] is b[0] for a, b in pairwise(carries))


# --- evaluation -----------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_scores_are_the_returns_of_whole_episodes(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the counting environment, the reward of a frame is the number of the frame.

    Episodes 0, 1, 2 and 3 have 7, 10, 8 and 11 frames. Two environments play the first two, and the
    one that ends first plays the third. Episodes that end earlier than these do not count.
    """
    lengths = [7, 10, 8, 11]
    carries = record_carries(monkeypatch, "act")
    with make("dummy:count", num_envs=count, repeat=1, mode="eval") as env:
        result = run_episodes(Agent(env.spec, agent_config()), env, 4)
    assert result.lengths == lengths
    assert result.returns == [n * (n + 1) / 2 for n in lengths]
    assert are_passed_on(carries)


def test_evaluation_and_training_have_different_episodes(tmp_path: Path) -> None:
    config = run_config(tmp_path)
    other = replace(config, seed=1)
    envs = [
        *(make_train_env(x, None) for x in (config, other)),
        *(make_eval_env(config, None, 1, x.seed) for x in (config, other)),
    ]
    first = {env.reset()[0].obs["vector"].tobytes() for env in envs}
    assert len(first) == 4
    agents = [make_agent(x, VECTOR, pick_device("cpu"))[0] for x in (config, config, other)]
    same, again, another = (agent.actor.net.output.weight for agent in agents)
    assert (same == again).all() and not (same == another).all()


# --- training -------------------------------------------------------------------------------


def test_observations_are_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first carry includes the prefill, which ends in the middle of an episode."""
    carries = record_carries(monkeypatch, "explore")
    train(run_config(tmp_path / "run", "log.inspect_every=0"))
    assert carries[0][0].deter.any() and are_passed_on(carries)


def test_rows_of_several_environments(tmp_path: Path) -> None:
    settings = ("task=dummy:count", "env.num_envs=2", "env.repeat=1", "steps=80", "train.length=4")
    run = train(run_config(tmp_path / "run", *settings, "log.inspect_every=0"))
    saved = checkpoint.load(run / "checkpoint.pt")
    with run_folder.open_replay(run) as replay:
        rows, number = replay.sample(400, 4, np.random.default_rng(0))
        history = replay.history()
    assert ((np.diff(number) != 0) == rows.is_first[:, 1:]).all()  # an episode has one number
    parity = (number - rows.obs["vector"][..., 0] * 2).astype(int)
    # The parity is the index of the environment.
    assert set(parity.flatten()) == {0, 1} and (parity == parity[:, :1]).all()
    assert saved["decisions"] == saved["frames"] == (~history.is_first).sum()


@pytest.mark.parametrize("patience", [1e9, 0.0], ids=["patient", "late"])
def test_checkpoints_wait_for_the_end_of_an_episode(
    patience: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint that has waited too long is written in the middle of an episode."""
    at_end, original = [], Trainer.save

    def save(trainer: Trainer) -> None:
        at_end.append(bool(trainer.env.is_last.all()))
        original(trainer)

    monkeypatch.setattr(Trainer, "save", save)
    monkeypatch.setattr(latentplan.training.loop, "FIRST_CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(latentplan.training.loop, "PATIENCE_SECONDS", patience)
    train(run_config(tmp_path / "run", "log.checkpoint_seconds=1e-6", "log.inspect_every=0"))
    # The last checkpoint ends the session and waits for nothing.
    assert len(at_end) > 2 and all(at_end[:-1]) == (patience > 0)


def test_the_time_limit_is_in_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock of this test advances by one second whenever the loop reads it."""
    seconds = iter(range(1_000_000))
    clock = type("Clock", (), {"monotonic": staticmethod(lambda: float(next(seconds)))})
    monkeypatch.setattr(latentplan.training.loop, "time", clock)
    steps = record_results(monkeypatch, VectorEnv, "step_wait")
    train(run_config(tmp_path / "run", "train.minutes=0.5", "steps=100_000", "log.inspect_every=0"))
    # Each step reads the clock twice: for the time limit, and for a due checkpoint.
    assert 14 <= len(steps) <= 16


# --- the replay of a run --------------------------------------------------------------------


def test_a_replay_is_inspected_as_a_copy(tmp_path: Path) -> None:
    """The copy has the state of the checkpoint, without later rows. The original is unchanged."""
    run = train(run_config(tmp_path / "run", "log.inspect_every=0"))
    config, spec, _ = run_folder.load(run)
    saved = checkpoint.load(run / "checkpoint.pt")
    replay = Replay(run / "replay", spec, capacity=config.replay.capacity, envs=1)
    replay.load_state_dict(saved["replay"])
    rows, _ = replay.sample(1, 1, np.random.default_rng(0))
    history = replay.history()
    replay.add(rows.map(lambda x: x[:, 0]), np.zeros(1, int))
    replay.close()
    content = lambda: {x.name: x.read_bytes() for x in (run / "replay").iterdir()}  # noqa: E731
    before = content()
    with run_folder.open_replay(run) as copy:
        np.testing.assert_array_equal(copy.history().reward, history.reward)
    assert content() == before


def test_plans_are_stored_with_the_rows_that_their_actions_led_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan that chose an action has the action as its mean here, and a gain of one."""
    explore = Agent.explore

    def planned(agent: Agent, *arguments: Any) -> tuple:
        action, carry, plan, metrics = explore(agent, *arguments)
        assert plan is not None
        return action, carry, PlanTarget(action, plan.std, torch.ones(len(action))), metrics

    monkeypatch.setattr(Agent, "explore", planned)
    items = ("plan.search=cross_entropy", "plan.candidates=4", "plan.elites=2", "plan.rounds=1")
    items += ("plan.imagine_fraction=0", "distill.stored=true", "distill.weight=0.1")
    config = run_config(tmp_path / "run", *items, "env.num_envs=2", "log.inspect_every=0")
    folder = train(config)
    _, spec, _ = run_folder.load(folder)
    with closing(Replay(folder / "replay", spec, capacity=1000, envs=2, plans=True)) as replay:
        rows = replay.history()
    plan = rows.prev_plan
    assert plan is not None
    by_plan = plan.gain > 0
    assert not by_plan[:, :10].any() and not by_plan[rows.is_first].any()  # prefill and resets
    assert by_plan[:, 12:][~rows.is_first[:, 12:]].all()
    assert (plan.mean[by_plan] == rows.prev_action[by_plan]).all() and (plan.std >= 0).all()
    assert read_metrics(folder)[-1]["train/plan/stored_gain"] > 0
