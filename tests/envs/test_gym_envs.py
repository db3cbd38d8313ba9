"""Gymnasium environments of users: supported spaces, refused spaces, and failures."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from environments import children, make, run_python, walk

from latentplan.config.loading import load
from latentplan.config.schema import EnvConfig
from latentplan.envs import StepInterruptedError, gym, make_vector
from latentplan.envs.actions import choices, one_hot, random_actions
from latentplan.envs.modules import import_module
from latentplan.types import EnvSpec, UserError

MODULE = """
import os
import time
import gymnasium
import numpy as np
from gymnasium import spaces


class Mine(gymnasium.Env):
    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}

    def __init__(self, render_mode=None, kind="plain"):
        self.render_mode, self.kind, self.time = render_mode, kind, 0
        high = np.array([2, 4], np.float32)
        self.action_space = spaces.Box(0 * high, high)
        if kind == "unmakeable":
            raise OSError("100% broken")
        if kind == "unbounded":
            self.action_space = spaces.Box(-np.inf, np.inf, (2,))
        if kind == "discrete":
            self.action_space = spaces.Discrete(3, start=-1)
        if kind == "several":
            self.action_space = spaces.MultiDiscrete([[2, 3]], np.int32)
        if kind == "binary":
            self.action_space = spaces.MultiBinary(3)
        plain = spaces.Box(-np.inf, np.inf, (3,), np.float64)
        image = spaces.Box(0, 255, (40, 30, 3), np.uint8)
        self.observation_space = plain
        if kind in ("image", "floating"):
            self.observation_space = image
        if kind == "dict":
            vector = spaces.Box(-1, 1, (2, 2), np.float32)
            self.observation_space = spaces.Dict({"z": vector, "eye": image, "a": plain})
        if kind == "two eyes":
            self.observation_space = spaces.Dict({"left": image, "right": image})
        if kind == "gray":
            self.observation_space = spaces.Box(0, 255, (40, 30, 1), np.uint8)

    def observe(self):
        image = np.full((40, 30, 3), 7, np.uint8)
        image[:, :15] = 100
        plain = np.array([self.time, *np.resize(self.action, 2)], float)
        if self.kind == "image":
            return image
        if self.kind == "floating":
            return image / 255
        if self.kind in ("short", "long"):
            return plain[:1] if self.kind == "short" else np.ones(4)
        if self.kind == "dict":
            return {"z": np.ones((2, 2), np.float32), "eye": image, "a": plain}
        return plain

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time, self.action = 0, np.zeros(2)
        self.action[0] = self.np_random.uniform()
        if self.kind == "unbuildable":
            raise ValueError("100% broken")
        return self.observe() if self.kind == "bare" else (self.observe(), {})

    def step(self, action):
        self.time, self.action = self.time + 1, action
        if self.time == 3 and self.kind == "hangs":
            time.sleep(1000)
        if self.time == 3 and self.kind == "dies":
            os._exit(7)
        if self.time == 3 and self.kind == "raises":
            raise ZeroDivisionError("100% broken")
        if self.kind == "four":
            return self.observe(), 1.0, False, {}
        rewards = {"nan": float("nan"), "one": np.ones(1), "pair": np.ones(2), "none": None}
        reward = rewards.get(self.kind, 1.0)
        ended, cut = self.time == 5, self.kind == "cut"
        return self.observe(), reward, ended and not cut, ended and cut, {}

    def get_action_meanings(self):
        return ["LEFT", "STAY", "RIGHT"]

    def render(self):
        frame = np.zeros((100, 50, 3), np.uint8)
        frame[:50] = 255
        return frame


gymnasium.register("Mine-v0", Mine)
"""
KINDS = (
    *("plain", "cut", "unbounded", "binary", "discrete", "several", "image", "dict"),
    *("hangs", "dies", "raises", "nan"),
)
SHAPES = ("two eyes", "gray", "short", "long", "floating", "one", "pair", "none", "four", "bare")
WRONG = (*SHAPES, "unbuildable", "unmakeable")


ENUMERATED = """
import enum
import gymnasium


class Actions(enum.IntEnum):
    go = 1
    stay = 0


class Enumerated(gymnasium.Env):
    observation_space = gymnasium.spaces.Discrete(2)
    action_space = gymnasium.spaces.Discrete(2)
    actions = Actions


gymnasium.register("Enumerated-v0", Enumerated)
"""


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("mine") / "mine.py"
    name = lambda kind: kind.title().replace(" ", "")  # noqa: E731
    kinds = "".join(
        f'gymnasium.register("{name(kind)}-v0", Mine, kwargs={{"kind": "{kind}"}})\n'
        for kind in (*KINDS, *WRONG)
    )
    path.write_text(MODULE + kinds)
    return str(path)


def test_actions_are_scaled_to_the_environments_bounds(module: str) -> None:
    with make("gym:Plain-v0", module=module, repeat=1) as env:
        assert (env.spec.action_dim, env.spec.repeat) == (2, 1)
        assert (env.spec.action_low, env.spec.action_high) == ((0, 0), (2, 4))
        assert EnvSpec.from_dict(json.loads(json.dumps(env.spec.to_dict()))) == env.spec
        env.reset()
        for action, expected in (([-1, -1], [0, 0]), ([1, 0], [2, 2]), ([3, -9], [2, 0])):
            row, _ = env.step(np.array([action]))
            np.testing.assert_allclose(row.obs["vector"][0, 1:], expected)


def test_a_discrete_action_is_the_number_of_the_largest_entry(module: str) -> None:
    with make("gym:Discrete-v0", module=module, repeat=1) as env:
        spec = env.spec
        assert (spec.action_dim, spec.action_groups, spec.action_shape) == (3, (3,), ())
        assert spec.action_names == ("LEFT", "STAY", "RIGHT")
        assert EnvSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
        env.reset()
        for action, number in (([1, 0, 0], -1), ([0, 0, 1], 1), ([0.2, 0.3, -1], 0)):
            row, _ = env.step(np.array([action]))
            assert row.obs["vector"][0, 1] == number
            expected = np.eye(3)[number + 1]  # what was executed is recorded
            assert (row.prev_action[0] == expected).all() and row.prev_action.dtype == np.float32


def test_an_environment_gets_choices_in_the_form_of_its_space(module: str) -> None:
    import_module(module)
    for name, shape, kind in (("Discrete", (), np.int64), ("Several", (1, 2), np.int32)):
        simulator = gym.build(f"{name}-v0", "state", module, 64, None)
        simulator.reset(0, 0)
        actions = simulator.actions
        simulator.advance(actions.to_environment(np.zeros(actions.dim)))
        action = simulator._env.unwrapped.action
        assert simulator._env.action_space.contains(action)
        assert np.shape(action) == shape and action.dtype == kind
        if name == "Discrete":
            assert {-1: "found"}[action] == "found"  # environments look actions up in tables
        simulator.close()


def test_random_actions_take_every_choice(module: str) -> None:
    with make("gym:Several-v0", module=module) as env:
        drawn = random_actions(np.random.default_rng(0), 300, env.spec)
    assert drawn.shape == (300, 5) and drawn.dtype == np.float32
    np.testing.assert_allclose(drawn.mean(0), [1 / 2] * 2 + [1 / 3] * 3, atol=0.1)
    chosen = choices(drawn, (2, 3))
    assert (one_hot(chosen, (2, 3)) == drawn).all()


def test_cart_pole_terminates_where_the_pole_falls() -> None:
    with make("gym:CartPole-v1", repeat=1) as env:
        assert env.spec.action_groups == (2,)
        env.reset()
        rows = [env.step(np.array([[0.0, 1.0]]))[0] for _ in range(30)]
    ends = [bool(row.is_terminal[0]) for row in rows]
    assert any(ends) and rows[ends.index(True) + 1].is_first[0]
    assert rows[ends.index(True)].prev_action.tolist() == [[0.0, 1.0]]


def test_atari_observes_its_screen_and_names_its_actions() -> None:
    pytest.importorskip("ale_py")
    config = load([], ["task=gym:ALE/Pong-v5", "env.workers=false"])
    with make_vector(config.task, "pixels", config.env, num_envs=1, seed=0) as env:
        assert env.spec.action_names[:2] == ("NOOP", "FIRE") and env.spec.repeat == 4
        first, _ = env.reset()
        for _ in range(20):
            row, frames = env.step(np.eye(6)[None, 2])
    assert frames[0] == 4 and (row.obs["image"] != first.obs["image"]).any()


@pytest.mark.parametrize("task", ["gym:MiniGrid-Empty-8x8-v0", "gym:MiniGrid-DoorKey-5x5-v0"])
def test_minigrid_is_observed_as_a_picture_and_as_the_codes_of_its_cells(task: str) -> None:
    pytest.importorskip("minigrid")
    config = load([], [f"task={task}", "env.workers=false"])
    with make_vector(config.task, "both", config.env, num_envs=1, seed=0) as env:
        row, _ = env.reset()
        assert env.spec.action_names[:3] == ("left", "right", "forward") and env.spec.repeat == 1
        assert env.spec.obs["vector"][0] == (4 + 7 * 7 * 3,)  # direction, and the agent's view
        assert row.obs["vector"][0, :4].sum() == 1 and row.obs["vector"].max() < 11
        assert row.obs["image"].max() > 200  # a picture is not as dark as the codes


def test_the_goal_of_minigrid_is_a_success() -> None:
    pytest.importorskip("minigrid")
    config = load([], ["task=gym:MiniGrid-Empty-8x8-v0", "env.workers=false"])
    way = [2] * 5 + [1] + [2] * 5  # forward, right
    with make_vector(config.task, "state", config.env, num_envs=1, seed=0) as env:
        env.reset()
        success = []
        for action in way:
            row, _ = env.step(np.eye(7, dtype=np.float32)[None, action])
            success += env.success
    assert success == [False] * 10 + [True] and row.is_terminal[0]
    assert row.reward[0] == pytest.approx(1 - 0.9 * 11 / 256)


def test_the_actions_of_an_enumeration_have_its_names(tmp_path: Path) -> None:
    path = tmp_path / "enumerated.py"
    path.write_text(ENUMERATED)
    with make("gym:Enumerated-v0", module=str(path)) as env:
        assert env.spec.action_names == ("stay", "go")


def test_termination_inside_a_repeat(module: str) -> None:
    with make("gym:Plain-v0", module=module, repeat=2) as env:
        rows, frames = walk(env, 5)
    assert [int(count[0]) for count in frames] == [0, 2, 2, 1, 0, 2]
    assert [bool(row.is_terminal[0]) for row in rows] == [False, False, False, True, False, False]
    assert [float(row.reward[0]) for row in rows] == [0, 2, 2, 1, 0, 2]
    assert rows[0].obs["vector"][0, 1] != rows[4].obs["vector"][0, 1]  # another seed


def test_a_reward_may_be_an_array_of_one_element(module: str) -> None:
    with make("gym:One-v0", module=module, repeat=2) as env:
        rows, _ = walk(env, 1)
    assert rows[1].reward[0] == 2


def test_a_truncated_episode_does_not_terminate(module: str) -> None:
    with make("gym:Cut-v0", module=module, repeat=2) as env:
        rows, frames = walk(env, 5)
    assert [int(count[0]) for count in frames] == [0, 2, 2, 1, 0, 2]
    assert [bool(row.is_first[0]) for row in rows] == [True, False, False, False, True, False]
    assert not any(row.is_terminal[0] for row in rows)


@pytest.mark.parametrize("workers", [False, True])
def test_a_frame_of_another_size_is_resized(module: str, workers: bool) -> None:
    with make("gym:Plain-v0", "both", num_envs=2, module=module, workers=workers) as env:
        assert env.spec.obs["image"] == ((64, 64, 3), "uint8")
        row, _ = env.reset()
    image = row.obs["image"]
    assert image.shape == (2, 64, 64, 3) and image.dtype == np.uint8
    assert (image[:, :30] == 255).all() and (image[:, 34:] == 0).all()
    assert row.obs["vector"].shape == (2, 3)


def test_dict_observations_give_vector_and_image(module: str) -> None:
    with make("gym:Dict-v0", "both", module=module) as env:
        row, _ = env.reset()
    assert env.spec.obs["vector"][0] == (7,)
    np.testing.assert_array_equal(row.obs["vector"][0, 3:], np.ones(4))  # "a" before "z"
    # The image is the entry of the observation, and not the result of render().
    assert abs(int(row.obs["image"][0, 32, 10, 0]) - 100) <= 1


@pytest.mark.parametrize(
    ("kind", "obs", "words"),
    [
        ("Unbounded", "state", "no bounds"),
        ("Binary", "state", "actions are MultiBinary, and only Box, Discrete and MultiDiscrete"),
        ("Image", "state", "obs=pixels"),
        ("TwoEyes", "both", "obs=pixels"),
        ("Gray", "state", "obs=pixels"),
        ("Nowhere", "state", "env.module"),
        ("Unbuildable", "state", "100% broken"),
        ("Unmakeable", "state", "gym:Unmakeable-v0 cannot be built: OSError: 100% broken"),
        ("Short", "state", r"vector of shape \(1,\) float64, but declared \(3,\)"),
        ("Long", "state", r"vector of shape \(4,\) float64, but declared \(3,\)"),
        ("Floating", "pixels", r"image .* float64, but .* uint8"),
        ("Bare", "state", "reset returned 1 value, and .* 2: observation, info"),
        ("Four", "state", "step returned 4 values, and .* 5: observation, reward, term"),
        ("Pair", "state", "reward that is not one number"),
        ("None", "state", "reward that is not one number, but None"),
        ("Raises", "state", "ZeroDivisionError: 100% broken .*mine.py, line"),
        ("Nan", "state", "reward of nan"),
    ],
)
@pytest.mark.parametrize("workers", [False, True])
def test_unusable_environments_are_refused_in_one_sentence(
    module: str, kind: str, obs: str, words: str, workers: bool
) -> None:
    with (
        pytest.raises(UserError, match=words) as caught,
        make(f"gym:{kind}-v0", obs, module=module, workers=workers) as env,
    ):
        walk(env, 8)  # two episodes, since a fault in one may be chance
    assert "\n" not in str(caught.value)
    assert not children()


def test_a_module_that_cannot_be_imported_is_named(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("1 / 0\n")
    for module, words in ((str(bad), "ZeroDivisionError"), ("no_such_module", "no_such_module")):
        with pytest.raises(UserError, match=words):
            make("gym:Mine-v0", module=module, workers=True)


def test_a_hung_environment_is_ended(module: str) -> None:
    start = time.monotonic()
    with (
        pytest.raises(UserError, match="did not answer for 3 s"),
        make("gym:Hangs-v0", module=module, workers=True, timeout=3.0, num_envs=2) as env,
    ):
        walk(env, 8)
    assert time.monotonic() - start < 20
    assert not children()


def test_a_stop_does_not_wait_for_a_hung_environment(module: str) -> None:
    with make("gym:Hangs-v0", module=module, workers=True, timeout=100.0, num_envs=2) as env:
        env.reset()
        with pytest.raises(StepInterruptedError):
            for _ in range(4):
                env.step_async(np.zeros((2, env.spec.action_dim)))
                start = time.monotonic()
                env.step_wait(lambda: True)
        assert time.monotonic() - start < 20
        assert not children()


def test_a_dead_worker_is_reported(module: str) -> None:
    with (
        pytest.raises(UserError, match=r"died \(exit code 7\)"),
        make("gym:Dies-v0", module=module, workers=True) as env,
    ):
        walk(env, 8)
    assert not children()


def test_closing_with_a_step_under_way_leaves_no_process() -> None:
    env = make("dummy:count", workers=True, num_envs=2)
    env.reset()
    assert len(children()) == 2
    env.step_async(np.zeros((2, 2)))
    env.close()
    env.close()
    assert not children()


def test_workers_end_with_their_owner() -> None:
    code = (
        "import os, psutil, sys\n"
        "from latentplan.config.schema import EnvConfig\n"
        "from latentplan.envs import make_vector\n"
        "env = make_vector('dummy:count', 'state', EnvConfig(),"
        " num_envs=1, seed=0, renderer=None)\n"
        "env.reset()\n"
        "print(*[e.process.pid for e in env._envs])\n"
        "sys.stdout.flush()\n"
        "os._exit(0)\n"  # no clean-up of any kind, as with SIGKILL
    )
    pids = [int(word) for word in run_python("-c", code).split()]
    assert len(pids) == 1
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and any(psutil.pid_exists(pid) for pid in pids):
        time.sleep(0.1)
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_ctrl_c_does_not_reach_the_workers() -> None:
    with make("dummy:count", workers=True) as env:
        env.reset()
        for pid in children():
            os.kill(pid, signal.SIGINT)
        time.sleep(0.3)
        row, _ = env.step(np.zeros((1, 2)))
    assert row.obs["vector"][0, 1] == 2


def test_workers_never_import_torch_nor_the_main_module(tmp_path: Path) -> None:
    """A script without a __main__ guard, with torch loaded, must not run again in its workers."""
    script = tmp_path / "script.py"
    script.write_text(
        "import psutil, torch\n"
        "from latentplan.config.schema import EnvConfig\n"
        "from latentplan.envs import make_vector\n"
        "print('started')\n"
        "env = make_vector('walker_walk', 'state', EnvConfig(),"
        " num_envs=2, seed=0, renderer=None)\n"
        "env.reset()\n"
        "for one in env._envs:\n"
        "    maps = psutil.Process(one.process.pid).memory_maps(grouped=True)\n"
        "    paths = ' '.join(m.path for m in maps)\n"
        "    print('libtorch' in paths, 'mujoco' in paths)\n"
        "import sys\n"
        "print('dm_control' in sys.modules)\n"
        "env.close()\n"
    )
    output = run_python(str(script))
    assert output.splitlines() == ["started", "False True", "False True", "False"]


def test_pendulum_is_observed_as_images() -> None:
    with make("gym:Pendulum-v1", "pixels", workers=True, image_size=32) as env:
        row, _ = env.reset()
        later, _ = env.step(np.ones((1, 1)))
    assert row.obs["image"].shape == (1, 32, 32, 3)
    assert row.obs["image"].mean() > 200  # a white background
    assert not np.array_equal(row.obs["image"], later.obs["image"])


def test_a_file_can_import_its_neighbours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "latentplan_test_neighbour.py").write_text("LENGTH = 10\n")
    file = tmp_path / "mine.py"
    file.write_text("from latentplan_test_neighbour import LENGTH\nassert LENGTH == 10\n")
    import_module(str(file))
    assert sys.modules.pop("latentplan_test_neighbour").LENGTH == 10


# --- films ----------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [False, True])
@pytest.mark.parametrize(("kind", "obs"), [("Plain", "state"), ("Image", "pixels")])
def test_the_camera_of_a_film_is_not_what_the_agent_sees(
    module: str, kind: str, obs: str, workers: bool
) -> None:
    settings = EnvConfig(module=module, repeat=3, workers=workers)
    with make_vector(f"gym:{kind}-v0", obs, settings, num_envs=2, seed=0, film=True) as env:
        env.reset()
        picture = env.draw(1)
        env.step(np.zeros((2, 2)))  # a drawing changes nothing
    assert picture.image.shape == (600, 300, 3)  # 100 x 50, enlarged six times
    assert (picture.image[:300] == 255).all() and not picture.image[300:].any()
    assert picture.seconds == pytest.approx(3 / 30)


def test_an_environment_without_a_picture_cannot_be_drawn(module: str) -> None:
    with make("gym:Plain-v0", module=module) as env:  # made without a film
        env.reset()
        with pytest.raises(UserError, match="cannot be drawn"):
            env.draw(0)
