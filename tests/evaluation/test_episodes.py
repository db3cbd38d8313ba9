"""Evaluation episodes: each has a start and a randomness of its own."""

from __future__ import annotations

import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from environments import make
from tiny import agent_config, perturb, run_config

from latentplan.agent import Agent
from latentplan.envs import VectorEnv, make_eval_env
from latentplan.envs.simulator import Picture
from latentplan.evaluation.episodes import run_episodes, score
from latentplan.types import Timestep

MODES = ("mean", "sample", "planner")
SETTINGS = ("plan.candidates=3", "plan.horizon=2", "world.members=3", "plan.act_rate=0.5")


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory):
    """The returns of a number of episodes, by mode, of an agent with random weights."""
    config = run_config(tmp_path_factory.mktemp("run"), *SETTINGS)
    with make_eval_env(config, None, 1, 0) as env:
        torch.manual_seed(0)
        agent = Agent(env.spec, config)
    perturb(agent.parameters(), 0.1)

    def returns(episodes: int) -> dict[str, list[float]]:
        scores = score(agent, config, None, MODES, episodes, seed=7)
        return {mode: result.returns for mode, result in scores}

    return agent, config, returns


def test_the_scores_of_two_episodes_are_the_first_of_five(played) -> None:
    _, _, returns = played
    two, five, twelve = returns(2), returns(5), returns(12)
    for mode in MODES:
        assert two[mode] == five[mode][:2] and five[mode] == twelve[mode][:5]
        assert len(set(twelve[mode])) == 12, "every episode is another one"
    assert five["mean"] != five["sample"] != five["planner"]


@pytest.mark.parametrize("mode", MODES)
def test_an_episode_is_the_same_for_any_number_of_environments(played, mode: str) -> None:
    agent, config, _ = played
    results = []
    for count in (1, 2, 3):
        with make_eval_env(config, None, count, 0) as env:
            results.append(run_episodes(agent, env, 4, mode).returns)
    # Products over another number of rows are rounded differently.
    np.testing.assert_allclose(results[1], results[0], rtol=1e-3)
    np.testing.assert_allclose(results[2], results[0], rtol=1e-3)


def test_evaluation_keeps_no_rows() -> None:
    alive: list[weakref.ref] = []
    most = 0

    def watch(row: Timestep) -> None:
        nonlocal most
        alive.append(weakref.ref(row.obs["image"]))
        most = max(most, sum(x() is not None for x in alive))

    with make("dummy:count", "both", num_envs=2, repeat=1, mode="eval") as env:
        run_episodes(Agent(env.spec, agent_config()), env, 6, watch=watch)
    assert len(alive) > 20 and most <= 3


def test_a_film_shows_the_first_episode_of_environment_0() -> None:
    def camera(env: VectorEnv, row: Timestep) -> Picture:
        return Picture(row.obs["vector"][0, :2], 0.1)  # the episode and the frame

    with make("dummy:count", num_envs=2, repeat=1, mode="eval") as env:
        film = run_episodes(Agent(env.spec, agent_config()), env, 5, camera=camera).film
    assert film.fps == pytest.approx(10)
    np.testing.assert_array_equal(film.frames, [(0, frame) for frame in range(8)])


GOALS = """
import gymnasium
import numpy as np
from gymnasium import spaces


class Goals(gymnasium.Env):
    metadata = {"render_modes": []}
    observation_space = spaces.Box(-1, 1, (2,), np.float32)
    action_space = spaces.Box(-1, 1, (1,), np.float32)
    episodes = 0

    def __init__(self, key):
        self.key = key

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time, self.episodes = 0, self.episodes + 1
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.time += 1
        reached = np.bool_(self.episodes == 2 and self.time == 3)  # and not at the end
        info = {self.key: reached} if self.key else {}
        return np.zeros(2, np.float32), float(reached), False, self.time == 6, info


for name in ("success", "is_success", ""):
    gymnasium.register(f"Goals{name.title().replace('_', '')}-v0", Goals, kwargs={"key": name})
"""


@pytest.mark.parametrize("name", ["Success", "IsSuccess", ""])
def test_successes_are_those_that_the_task_tells(tmp_path: Path, name: str) -> None:
    (tmp_path / "goals.py").write_text(GOALS)
    module = str(tmp_path / "goals.py")
    with make(f"gym:Goals{name}-v0", module=module, repeat=2, mode="eval") as env:
        scores = run_episodes(Agent(env.spec, agent_config()), env, 3)
    assert scores.successes == ([False, True, False] if name else None)


def test_a_positive_reward_can_be_the_success(tmp_path: Path) -> None:
    (tmp_path / "goals.py").write_text(GOALS)
    settings = {"module": str(tmp_path / "goals.py"), "repeat": 2, "mode": "eval"}
    with make("gym:Goals-v0", success="reward", **settings) as env:
        scores = run_episodes(Agent(env.spec, agent_config()), env, 3)
    assert scores.successes == [False, True, False]
