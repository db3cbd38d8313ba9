"""Environments: names, seeds, counts of frames, alignment and snapshots."""

from __future__ import annotations

import dm_env
import numpy as np
import pytest
from environments import make, run_python, walk

from latentplan.config.tasks import DMC_TASKS
from latentplan.envs import parse_task
from latentplan.envs.dummy import Blob, Count
from latentplan.envs.simulator import episode_seed
from latentplan.types import UserError


@pytest.mark.parametrize(
    ("spelling", "expected"),
    [
        *[
            (spelling, ("dmc", "walker_walk"))
            for spelling in (
                "dmc:walker_walk",
                "walker_walk",
                "walker-walk",
                "dmc_walker_walk",
                "dmc_walker-walk",
                "walker/walk",
                "dmc:walker/walk",
                "Walker_Walk",
            )
        ],
        ("ball_in_cup_catch", ("dmc", "ball_in_cup_catch")),
        ("cup_catch", ("dmc", "ball_in_cup_catch")),
        ("cup-catch", ("dmc", "ball_in_cup_catch")),
        ("humanoid_cmu_run", ("dmc", "humanoid_CMU_run")),
        ("swimmer6", ("dmc", "swimmer_swimmer6")),
        ("cartpole_swingup_sparse", ("dmc", "cartpole_swingup_sparse")),
        ("gym:Pendulum-v1", ("gym", "Pendulum-v1")),
        ("gym:ns/Mine-v0", ("gym", "ns/Mine-v0")),
        ("dummy:pixels", ("dummy", "pixels")),
    ],
)
def test_all_spellings_of_a_task_are_parsed(spelling: str, expected: tuple[str, str]) -> None:
    assert parse_task(spelling) == expected


@pytest.mark.parametrize(
    ("typed", "named"),
    [
        ("walker_wlak", "walker_walk"),
        ("dmc:cheeta_run", "cheetah_run"),
        ("dummy:cont", "dummy:count"),
        ("Pendulum-v1", "gym:"),
        ("gym:", "gym:Pendulum-v1"),
    ],
)
def test_an_unknown_task_names_the_nearest(typed: str, named: str) -> None:
    with pytest.raises(UserError, match=named):
        parse_task(typed)


def test_the_table_of_tasks_equals_that_of_the_suite() -> None:
    from latentplan.envs.dmc import import_suite

    table = sorted((domain, task) for domain, tasks in DMC_TASKS.items() for task in tasks)
    assert table == sorted(import_suite(None).ALL_TASKS)


@pytest.mark.parametrize(
    ("task", "dim", "actions"),
    [
        ("cartpole_swingup", 5, 1),
        ("humanoid_CMU_walk", 137, 56),
        ("quadruped_escape", 101, 12),  # reads the rendering contexts at every reset
        ("lqr_2_1", 4, 1),  # its actuator has no limits
    ],
)
def test_suite_tasks_have_the_expected_state_vectors(task: str, dim: int, actions: int) -> None:
    with make(task) as env:
        assert env.spec.obs == {"vector": ((dim,), "float32")}
        assert env.spec.action_dim == actions
        rows, _ = walk(env, 3)
    assert all(row.obs["vector"].dtype == np.float32 for row in rows)
    assert not np.array_equal(rows[0].obs["vector"], rows[3].obs["vector"])


def test_the_vector_holds_every_entry_in_the_order_of_names() -> None:
    from latentplan.envs import dmc

    simulator = dmc.build("walker_walk", "state", 64, None)
    simulator.reset(seed=3, episode=0)
    entries = simulator._env.task.get_observation(simulator._env.physics)
    assert list(sorted(entries)) == ["height", "orientations", "velocity"]
    expected = np.concatenate([np.ravel(entries[name]) for name in sorted(entries)])
    np.testing.assert_array_equal(simulator.observe()["vector"], expected.astype(np.float32))
    simulator.close()


@pytest.mark.parametrize("repeat", [1, 2, 3, 8])
def test_one_episode_is_1000_frames(repeat: int) -> None:
    with make("cartpole_swingup", repeat=repeat) as env:
        decisions = -(-1000 // repeat)
        rows, frames = walk(env, decisions + 2)
    used = np.concatenate(frames)
    assert used.sum() == 1000 + repeat  # the second episode's reset costs nothing
    assert used[decisions] == (1000 % repeat or repeat)  # the last repeat may be partial
    assert used[decisions + 1] == 0 and rows[decisions + 1].is_first[0]
    assert not any(row.is_first[0] for row in rows[1 : decisions + 1])
    assert not any(row.is_terminal[0] for row in rows)  # a time limit is not a terminal state


def test_an_end_that_dm_control_calls_final_is_terminal() -> None:
    """The discount decides. In the suite only lqr ends this way."""
    from latentplan.envs import dmc

    simulator = dmc.build("cartpole_swingup", "state", 64, None)
    simulator.reset(seed=0, episode=0)
    still, observation = np.zeros(1), simulator._env.task.get_observation(simulator._env.physics)
    for step, expected in (
        (dm_env.transition(1.0, observation), (1.0, False, False)),
        (dm_env.truncation(1.0, observation), (1.0, False, True)),
        (dm_env.termination(1.0, observation), (1.0, True, False)),
    ):
        simulator._env.step = lambda action, step=step: step
        assert simulator.advance(still) == expected
    simulator.close()


def test_rows_around_the_end_of_an_episode() -> None:
    with make("cartpole_swingup", repeat=8, episode_frames=20) as env:
        env.reset()
        action = np.full((1, 1), 0.5)
        steps = [(env.step(action), env.is_last.copy(), env.episodes.copy()) for _ in range(5)]
    frames = [int(count[0]) for (_, count), _, _ in steps]
    assert frames == [8, 8, 4, 0, 8]
    assert [bool(last[0]) for _, last, _ in steps] == [False, False, True, False, False]
    assert [int(episodes[0]) for _, _, episodes in steps] == [1, 1, 1, 2, 2]
    rows = [row for (row, _), _, _ in steps]
    assert [bool(row.is_first[0]) for row in rows] == [False, False, False, True, False]
    assert not any(row.is_terminal[0] for row in rows)  # truncated, not terminated
    assert [float(row.prev_action[0, 0]) for row in rows] == [0.5, 0.5, 0.5, 0.0, 0.5]
    assert rows[3].reward[0] == 0


def test_repeat_sums_the_rewards_of_its_frames() -> None:
    with make("dummy:count", repeat=3) as env:
        env.reset()
        rewards = [float(env.step(np.zeros((1, 2)))[0].reward[0]) for _ in range(3)]
    assert Count.frames(0) == 7
    assert rewards == [1 + 2 + 3, 4 + 5 + 6, 7]


@pytest.mark.parametrize("workers", [False, True])
def test_counting_environment_through_the_vector_environment(workers: bool) -> None:
    with make("dummy:count", "both", num_envs=2, repeat=2, workers=workers, image_size=16) as env:
        rng = np.random.default_rng(0)
        row, frames = env.reset()
        expected_frame, ended = np.zeros(2, int), np.zeros(2, bool)
        kinds = set()
        for _ in range(40):
            episode, frame = (row.obs["vector"][:, i].astype(int) for i in (0, 1))
            np.testing.assert_array_equal(episode, env.episodes - 1)
            np.testing.assert_array_equal(frame, expected_frame)
            np.testing.assert_array_equal(row.is_first, frame == 0)
            np.testing.assert_array_equal(row.obs["vector"][:, 2:], row.prev_action)
            image = row.obs["image"]
            np.testing.assert_array_equal(image[:, 0, 0, 0], episode)
            np.testing.assert_array_equal(image[:, 7, 15, 1], frame)
            codes = Count.action_bytes(row.prev_action)
            np.testing.assert_array_equal(image[:, 15, 0, :2], codes)
            lengths = np.array([Count.frames(e) for e in episode])
            np.testing.assert_array_equal(env.is_last, frame == lengths)
            np.testing.assert_array_equal(row.is_terminal, env.is_last & (episode % 2 == 0))
            kinds |= {(bool(t), bool(e)) for t, e in zip(row.is_terminal, env.is_last, strict=True)}
            ended = env.is_last.copy()
            action = rng.uniform(-1.5, 1.5, (2, 2)).astype(np.float32)
            row, frames = env.step(action)
            expected = np.where(ended[:, None], 0, np.clip(action, -1, 1))
            np.testing.assert_array_equal(row.prev_action, expected)
            step = np.where(ended, 0, np.minimum(2, lengths - frame))
            np.testing.assert_array_equal(frames, step)
            expected_frame = np.where(ended, 0, frame + step)
    assert kinds == {(False, False), (True, True), (False, True)}  # both kinds of end occurred


def test_serial_and_worker_environments_agree() -> None:
    walks = []
    for workers in (False, True):
        with make("walker_walk", num_envs=2, workers=workers, episode_frames=10) as env:
            walks.append(walk(env, 12)[0])
    for serial, worker in zip(*walks, strict=True):
        np.testing.assert_array_equal(serial.obs["vector"], worker.obs["vector"])
        np.testing.assert_array_equal(serial.reward, worker.reward)
        np.testing.assert_array_equal(serial.is_first, worker.is_first)
    assert not np.array_equal(*walks[0][0].obs["vector"])  # two environments, two seeds


def test_an_episode_depends_on_its_seed_alone() -> None:
    """The third episode is the same after two others and in a fresh environment (a resume)."""
    settings = {"episode_frames": 6, "repeat": 2, "seed": 5}
    with make("cheetah_run", **settings) as env:
        rows, _ = walk(env, 11)
    starts = [i for i, row in enumerate(rows) if row.is_first[0]]
    assert starts == [0, 4, 8]
    with make("cheetah_run", first_episodes=[2], **settings) as env:
        fresh, _ = env.reset()
        np.testing.assert_array_equal(fresh.obs["vector"], rows[8].obs["vector"])
        assert env.episodes[0] == 3
        for old in rows[9:12]:
            row, _ = env.step(old.prev_action)
            np.testing.assert_array_equal(row.obs["vector"], old.obs["vector"])
            np.testing.assert_array_equal(row.reward, old.reward)
    assert not np.array_equal(rows[0].obs["vector"], rows[4].obs["vector"])


def test_training_and_evaluation_seeds_are_disjoint() -> None:
    def seeds(mode: str) -> set[int]:
        return {episode_seed(s, mode, i, e) for s in range(4) for i in range(4) for e in range(50)}

    train, evaluation = seeds("train"), seeds("eval")
    assert not train & evaluation
    assert len(train) > 795 and len(evaluation) > 795  # of 800: a hash, and not a constant
    assert episode_seed(1, "train", 2, 3) == 3790953168  # a resumed run must find its episodes
    with make("cartpole_swingup") as train_env, make("cartpole_swingup", mode="eval") as eval_env:
        first, second = (env.reset()[0].obs["vector"] for env in (train_env, eval_env))
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("obs", ["pixels", "state", "both"])
def test_the_blob_task_rewards_being_at_the_goal_and_shows_it(obs: str) -> None:
    def score(policy) -> float:
        with make("dummy:pixels", obs, repeat=2, seed=1) as env:
            row, _ = env.reset()
            total, frames = 0.0, 0
            while env.episodes[0] <= 8:
                row, used = env.step(policy(row))
                total, frames = total + row.reward[0], frames + used[0]
            assert frames // Blob.FRAMES == 8
            return total / frames

    def towards_goal(row) -> np.ndarray:
        if obs == "state":
            position = row.obs["vector"][0]
        else:  # the center of the red pixels
            red = row.obs["image"][0, ..., 0].astype(float)
            axis = np.linspace(-1.2, 1.2, 64)
            position = np.array([red.sum(0) @ axis, red.sum(1) @ -axis]) / red.sum()
        return np.clip(-position / (2 * Blob.SPEED), -1, 1)[None]

    rng = np.random.default_rng(0)
    chance = score(lambda row: rng.uniform(-1, 1, (1, 2)))
    best = score(towards_goal)
    assert 0.05 < chance < 0.4
    assert best > 0.8 and best > 2 * chance


def test_no_renderer_is_started_for_state_vectors() -> None:
    code = (
        "import os, sys\n"
        "from latentplan.config.schema import EnvConfig\n"
        "from latentplan.envs import make_vector\n"
        "env = make_vector('quadruped_escape', 'state', EnvConfig(workers=False),\n"
        "                  num_envs=1, seed=0, renderer=None)\n"
        "env.reset()\n"
        "print('OpenGL' in sys.modules, 'MUJOCO_GL' in os.environ, 'torch' in sys.modules)\n"
        "env.close()\n"
    )
    assert run_python("-c", code).split() == ["False", "False", "False"]


def test_a_simulator_can_be_restored_from_a_snapshot() -> None:
    from latentplan.envs import dmc

    simulator = dmc.build("cartpole_swingup", "state", 64, None)
    simulator.reset(3, 0)

    def push(action: float, frames: int) -> list[tuple[float, bool, bool]]:
        return [simulator.advance(np.array([action])) for _ in range(frames)]

    push(0.7, 990)
    saved, vector = simulator.snapshot(), simulator.observe()["vector"]
    one = [reward for reward, _, _ in push(-1.0, 8)]
    simulator.restore(saved)
    np.testing.assert_array_equal(simulator.observe()["vector"], vector)
    again = push(-1.0, 30)  # past the 1000 frames of an episode: no branch ends by time
    assert not any(terminated or truncated for _, terminated, truncated in again)
    np.testing.assert_allclose([reward for reward, _, _ in again[:8]], one, rtol=1e-6)
    simulator.restore(saved)
    other = [reward for reward, _, _ in push(1.0, 8)]
    assert np.abs(np.subtract(one, other)).max() > 1e-3
    simulator.close()
