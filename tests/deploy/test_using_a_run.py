"""Uses of a finished run: evaluation, planning, and the loaded agent in a user's own loop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import EPISODE, run_config

import latentplan
from latentplan.cli.main import main
from latentplan.deploy.loading import LoadedAgent
from latentplan.evaluation import evaluate as evaluate_module
from latentplan.runs import checkpoint
from latentplan.training.session import train


def test_eval_prints_json_and_writes_a_video(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    video = tmp_path / "film.gif"
    assert main(["eval", str(run), "--episodes", "3", "--seed", "5", "--video", str(video)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert len(result["returns"]) == 3 and result["lengths"] == [EPISODE] * 3
    assert result["mean"] == pytest.approx(np.mean(result["returns"]))
    assert (result["frames"], result["action_repeat"], result["seed"]) == (256, 4, 5)
    assert result["video"] == str(video) and video.read_bytes().startswith(b"GIF8")
    assert main(["eval", str(run), "--episodes", "3", "--seed", "5", "--video", str(video)]) == 0
    assert json.loads(capsys.readouterr().out) == result


def test_a_video_that_cannot_be_written_is_an_error_before_any_episode(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(evaluate_module, "score", None)
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "film.mp4", tmp_path, Path("/proc/film.gif")):
        assert main(["eval", str(run), "--video", str(path)]) == 2
        assert f"latentplan: {path}" in capsys.readouterr().err
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_run_without_a_planner_can_be_evaluated_with_one(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    film = str(tmp_path / "film.gif")
    command = ["eval", str(run), "--episodes", "1", "--video", film, "--policy"]
    scores = []
    for policy in (["mean"], ["planner", "--plan", "candidates=3", "horizon=2"]):
        assert main([*command, *policy]) == 0
        scores.append(json.loads(capsys.readouterr().out))
    actor, planner = scores
    assert planner["policy"] == "planner" and planner["beside"]["policy"] == "mean"
    assert planner["beside"]["returns"] == actor["returns"] != planner["returns"]
    assert planner["planner_gap"] == pytest.approx(planner["mean"] - actor["mean"])
    assert actor["beside"]["policy"] == "planner" and actor["candidates"] == 4  # the default
    assert main([*command, "planner", "--plan", "candidate=3"]) == 2
    assert "candidates" in capsys.readouterr().err


def test_a_run_with_one_ensemble_member_has_scores_of_actor_and_planner(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One member has no disagreement. A planner without a bonus for it needs only the returns."""
    folder = train(run_config(tmp_path / "one", "world.members=1", "log.inspect_every=0"))
    capsys.readouterr()
    assert main(["eval", str(folder), "--episodes", "1"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["beside"]["policy"] == "planner" and result["candidates"] == 4


def test_a_loaded_agent_acts_as_the_trained_one(run: Path) -> None:
    agent = latentplan.load(run)
    assert isinstance(agent, LoadedAgent)
    obs = {"image": np.zeros((16, 16, 3), np.uint8), "vector": np.ones(2, np.float32)}
    torch.manual_seed(0)
    actions = [agent.act(obs) for _ in range(3)]
    assert all(a.shape == (2,) and a.dtype == np.float32 and (abs(a) <= 1).all() for a in actions)
    agent.reset()
    torch.manual_seed(0)
    again = [agent.act(obs) for _ in range(3)]
    np.testing.assert_array_equal(actions, again)
    assert not np.array_equal(actions[0], actions[1])  # the agent has a memory
    saved = checkpoint.load(run / "checkpoint.pt")["agent"]
    for name, weight in agent.agent.state_dict().items():
        assert torch.equal(weight, saved[name])


@pytest.mark.parametrize(
    ("obs", "message"),
    [
        (np.zeros(2, np.float32), "image of shape"),
        ({"vector": np.zeros(2)}, "image of shape"),
        ({"image": np.zeros((16, 16, 3))}, "float64"),  # an image in [0, 1] would look black
        ({"image": np.zeros((16, 16, 3), np.uint8), "vector": [0, np.nan]}, "not finite"),
        ({"image": np.zeros((16, 16, 3), np.uint8), "vector": [1e300, 0]}, "not finite"),
        ({"image": np.zeros((16, 16, 3), np.uint8), "vector": [0, 1, 2]}, "vector of shape"),
    ],
)
def test_an_observation_of_another_form_than_in_training_is_an_error(
    run: Path, obs: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        latentplan.load(run).act(obs)


def test_a_loaded_agent_accepts_the_observations_of_the_environment(run: Path) -> None:
    """Images are resized. The numbers of a Dict are concatenated in the order of their names."""
    agent = latentplan.load(run)
    front = np.full((40, 30, 3), 7, np.uint8)
    of_environment = agent.act({"front": front, "b": np.array([2.0]), "a": 1.0})
    agent.reset()
    expected = agent.act({"image": np.full((16, 16, 3), 7, np.uint8), "vector": [1, 2]})
    np.testing.assert_array_equal(of_environment, expected)
    agent.reset()  # a Dict with names of training, and "extra" with three dimensions
    small = np.full((16, 16, 3), 7, np.uint8)
    mixed = agent.act({"image": small, "vector": 2.0, "extra": np.ones((1, 1, 1))})
    np.testing.assert_array_equal(mixed, expected)


def test_a_loaded_agent_uses_the_executed_action(run: Path) -> None:
    agent = latentplan.load(run)
    image = np.full((16, 16, 3), 7, np.uint8)
    rng = np.random.default_rng(0)
    observations = [{"image": image, "vector": rng.normal(size=2)} for _ in range(2)]
    first = agent.act(observations[0])
    expected = agent.act(observations[1])
    agent.reset()
    agent.act(observations[0])
    np.testing.assert_array_equal(agent.act(observations[1], executed=first), expected)
    agent.reset()
    agent.act(observations[0])
    assert (agent.act(observations[1], executed=-np.sign(first)) != expected).any()


@pytest.mark.parametrize(
    "wrong", [[np.nan, 0], [0, np.inf], [1.01, 0], [1e300, 0], np.zeros(3), np.zeros((1, 2)), 0.0]
)
def test_an_executed_action_of_another_form_is_an_error(run: Path, wrong: Any) -> None:
    image = np.full((16, 16, 3), 7, np.uint8)
    first, second = ({"image": image, "vector": np.full(2, x)} for x in (0.5, -0.5))
    agent = latentplan.load(run)
    agent.act(first)
    expected = agent.act(second, executed=np.array([1.0, -1.0]))
    agent.reset()
    agent.act(first)
    with pytest.raises(ValueError, match="action must be"):
        agent.act(second, executed=wrong)
    rounded = agent.act(second, executed=np.array([1.00001, -1.0]))
    np.testing.assert_array_equal(rounded, expected)
    agent.reset()
    agent.act(first)
    own = agent.act(second)
    agent.reset()
    agent.act(first)
    with pytest.raises(ValueError, match="vector of shape"):  # the state does not change
        agent.act({"image": image, "vector": np.zeros(3)}, executed=np.zeros(2))
    np.testing.assert_array_equal(agent.act(second), own)


def test_a_loaded_agent_converts_actions_to_the_environments_units(run: Path) -> None:
    agent = latentplan.load(run)
    agent.spec = agent.spec._replace(action_low=(-2.0, 0.0), action_high=(2.0, 10.0))
    np.testing.assert_allclose(agent.to_env(np.array([0.5, -1.0])), [1.0, 0.0])
    np.testing.assert_allclose(agent.to_env(np.array([3.0, 0.0])), [2.0, 5.0])  # as in training
    for wrong in ([np.nan, 0], [0, np.inf], [0.0]):
        with pytest.raises(ValueError, match="finite and of shape"):
            agent.to_env(np.array(wrong))
    agent.spec = agent.spec._replace(action_low=(), action_high=())
    with pytest.raises(ValueError, match="bounds"):
        agent.to_env(np.zeros(2))
