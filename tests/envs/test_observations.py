"""Observations and actions of Gymnasium environments, in every form that their spaces allow."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from environments import make
from gymnasium import spaces
from tiny import agent_config

from latentplan.agent import Agent
from latentplan.deploy.loading import LoadedAgent
from latentplan.envs.observations import ObservationError, entries_of, read
from latentplan.runs.payload import _spec
from latentplan.types import EnvSpec, UserError

RNG = np.random.default_rng(0)
COLORS = RNG.integers(0, 256, (16, 24, 3)).astype(np.uint8)
GRAY = COLORS[..., 0]
AS_COLORS = np.repeat(GRAY[..., None], 3, -1)
OTHER = COLORS[::-1, ::-1]


def bytes_box(*shape: int) -> spaces.Box:
    return spaces.Box(0, 255, shape, np.uint8)


def box(*shape: int, dtype: Any = np.float32) -> spaces.Box:
    return spaces.Box(-3, 3, shape, dtype)


IMAGES = {
    "channels last": (bytes_box(16, 24, 3), COLORS, COLORS),
    "mirrored": (bytes_box(16, 24, 3), COLORS[:, ::-1], COLORS[:, ::-1]),
    "channels first": (bytes_box(3, 16, 24), np.moveaxis(COLORS, -1, 0), COLORS),
    "gray": (bytes_box(16, 24), GRAY, AS_COLORS),
    "gray, one channel": (bytes_box(16, 24, 1), GRAY[..., None], AS_COLORS),
    "gray, first": (bytes_box(1, 16, 24), GRAY[None], AS_COLORS),
    "shares": (spaces.Box(0, 1, (16, 24, 3), np.float32), np.float32(COLORS / 255), COLORS),
    "gray shares": (spaces.Box(0, 1, (16, 24), np.float64), GRAY / 255, AS_COLORS),
    "first, shares": (
        spaces.Box(0, 1, (3, 16, 24), np.float64),
        np.moveaxis(COLORS, -1, 0) / 255,
        COLORS,
    ),
    "float bytes": (spaces.Box(0, 255, (16, 24, 3), np.float32), np.float32(COLORS), COLORS),
    "int bytes": (spaces.Box(0, 255, (16, 24, 3), np.int64), COLORS.astype(int), COLORS),
    "stack": (bytes_box(4, 16, 24, 3), np.stack([OTHER, OTHER, OTHER, COLORS]), COLORS),
    "gray stack": (bytes_box(4, 16, 24), np.stack([255 - GRAY] * 3 + [GRAY]), AS_COLORS),
    "stack, first": (
        bytes_box(2, 3, 16, 24),
        np.moveaxis(np.stack([OTHER, COLORS]), -1, 1),
        COLORS,
    ),
    "in a tuple": (spaces.Tuple((bytes_box(16, 24, 3), box(2))), (COLORS, np.zeros(2)), COLORS),
    "beside a text": (
        spaces.Dict(eye=bytes_box(16, 24, 3), mission=spaces.Text(9)),
        {"eye": COLORS, "mission": "go"},
        COLORS,
    ),
    "two cameras": (
        spaces.Dict(left=bytes_box(16, 24, 3), right=bytes_box(8, 12, 1)),
        {"right": GRAY[::2, ::2, None], "left": COLORS},
        np.hstack([COLORS, AS_COLORS[::2, ::2].repeat(2, 0).repeat(2, 1)]),
    ),
}
NUMBERS = {
    "matrix": (box(2, 3), np.arange(6).reshape(2, 3) / 3, np.arange(6) / 3),
    "mirrored": (box(3), np.arange(3)[::-1], [2, 1, 0]),
    "scalar": (box(), np.float32(2), [2]),
    "float64": (box(2, dtype=np.float64), np.array([0.1, 2.0]), [0.1, 2]),
    "integers": (spaces.Box(-5, 5, (2,), np.int64), np.array([-5, 4]), [-5, 4]),
    "bools": (spaces.Box(0, 1, (3,), np.bool_), np.array([True, False, True]), [1, 0, 1]),
    "few bytes": (bytes_box(4, 4), np.arange(16).reshape(4, 4), np.arange(16)),
    "codes of cells": (bytes_box(2, 2, 3), np.arange(12).reshape(2, 2, 3), np.arange(12)),
    "beside a text": (
        spaces.Dict(a=spaces.Text(5), b=box(2)),
        {"a": "go", "b": np.ones(2)},
        [1, 1],
    ),
    "shares": (spaces.Box(0, 1, (3, 3), np.float32), np.ones((3, 3)), np.ones(9)),
    "discrete": (spaces.Discrete(4), np.int64(2), [0, 0, 1, 0]),
    "discrete, with a start": (spaces.Discrete(3, start=-1), 1, [0, 0, 1]),
    "many values": (spaces.Discrete(10**6), 7, [7]),
    "multi-discrete": (spaces.MultiDiscrete([2, 3]), np.array([1, 0]), [0, 1, 1, 0, 0]),
    "multi-binary": (spaces.MultiBinary((2, 2)), np.array([[1, 0], [1, 1]]), [1, 0, 1, 1]),
    "nested": (
        spaces.Dict(
            b=spaces.Dict(y=box(1), x=box(1)), a=spaces.Tuple((spaces.Discrete(2), box(1)))
        ),
        {"b": {"x": [1.0], "y": [2.0]}, "a": (1, [3.0])},
        [0, 1, 3, 1, 2],
    ),
    "two cameras": (
        spaces.Dict(left=bytes_box(16, 24, 3), right=bytes_box(16, 24, 4), pose=box(2)),
        {"left": COLORS, "right": np.zeros((16, 24, 4), np.uint8), "pose": np.ones(2)},
        [1, 1],
    ),
    "depth": (
        spaces.Dict(depth=spaces.Box(0, 1, (16, 24, 1), np.float32), pose=box(2)),
        {"depth": GRAY[..., None] / 255, "pose": np.ones(2)},
        [1, 1],
    ),
    "a lone matrix of shares": (
        spaces.Box(0, 1, (8, 9), np.float32),
        np.full((8, 9), 0.5),
        np.full(72, 0.5),
    ),
}
REFUSED = [
    ("pixels", bytes_box(16, 24, 4), r"\(16, 24, 4\) uint8"),  # four grays, or a transparency?
    ("pixels", bytes_box(16, 24, 12), "leave out the wrapper that stacks"),
    ("both", spaces.Dict(a=bytes_box(16, 24, 2), b=box(2)), "'a' is an array"),
    ("state", bytes_box(16, 24, 3), "obs=pixels"),
    ("both", bytes_box(16, 24, 3), "obs=pixels"),
    ("state", spaces.Dict(a=spaces.Text(5)), "no numbers"),
    ("state", spaces.Sequence(spaces.Discrete(2)), "is a Sequence.*TransformObservation"),
    ("state", box(0), "no numbers"),
]


class Shows(gymnasium.Env):
    """An environment with any spaces, which returns one observation and keeps its last action."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}  # noqa: RUF012
    last: Any = None

    def __init__(
        self, space: Any, shown: Any, actions: Any = None, render_mode: Any = None
    ) -> None:
        self.observation_space, self.shown, self.render_mode = space, shown, render_mode
        self.action_space = actions or box(2)

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        return self.shown, {}

    def step(self, action: Any) -> Any:
        assert self.action_space.contains(action), repr(action)
        Shows.last = action
        return self.shown, 0.0, False, False, {}

    def render(self) -> Any:
        return np.full((16, 24, 3), 9, np.uint8)


@pytest.fixture(autouse=True)
def _register() -> Iterator[None]:
    yield
    gymnasium.registry.pop("Shows-v0", None)


def environment(space: Any, shown: Any, obs: str, actions: Any = None, **settings: Any) -> Any:
    """An environment in this process that observes ``shown``."""
    arguments = {"space": space, "shown": shown, "actions": actions}
    gymnasium.registry.pop("Shows-v0", None)
    gymnasium.register("Shows-v0", Shows, kwargs=arguments, order_enforce=False)
    from latentplan.envs import workers

    workers.describe_here.cache_clear()
    return make("gym:Shows-v0", obs, **settings)


def agent_of(spec: EnvSpec) -> LoadedAgent:
    """A loaded agent, whose spec has been in a file."""
    plain = json.loads(json.dumps(spec.to_dict()))
    size = next((shape[0] for shape, _ in spec.obs.values() if len(shape) == 3), 16)
    assert _spec(plain, size) == spec
    torch.manual_seed(0)
    config = agent_config()
    return LoadedAgent(Agent(spec, config, torch.device("cpu")), spec, config)


@pytest.mark.parametrize("kind", IMAGES)
def test_every_kind_of_image_is_used(kind: str) -> None:
    space, shown, expected = IMAGES[kind]
    observation = read(entries_of(space, "pixels"), shown)
    assert set(observation) == {"image"} and observation["image"].dtype == np.uint8
    np.testing.assert_array_equal(observation["image"], expected)


@pytest.mark.parametrize("kind", NUMBERS)
def test_every_kind_of_number_is_used(kind: str) -> None:
    space, shown, expected = NUMBERS[kind]
    observation = read(entries_of(space, "state"), shown)
    assert set(observation) == {"vector"} and observation["vector"].dtype == np.float32
    np.testing.assert_allclose(observation["vector"], expected, rtol=1e-6)


@pytest.mark.parametrize(("obs", "space", "words"), REFUSED)
def test_the_rest_is_refused_with_an_advice(obs: str, space: Any, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught, environment(space, None, obs):
        pass
    assert "\n" not in str(caught.value) and "gym:Shows-v0" in str(caught.value)


@pytest.mark.parametrize("kind", ["channels first", "two cameras", "gray stack", "mirrored"])
def test_an_agent_acts_on_images_as_the_environment_gives_them(kind: str) -> None:
    space, shown, _ = IMAGES[kind]
    with environment(space, shown, "pixels", image_size=16) as env:
        row, _ = env.reset()
        agent = agent_of(env.spec)
    action = agent.act(shown)
    agent.reset()
    np.testing.assert_array_equal(agent.act({"image": row.obs["image"][0]}), action)
    agent.reset()
    np.testing.assert_array_equal(agent.act(row.obs["image"][0]), action)


@pytest.mark.parametrize(
    "kind", ["nested", "discrete", "matrix", "two cameras", "mirrored", "beside a text"]
)
def test_an_agent_acts_on_numbers_as_the_environment_gives_them(kind: str) -> None:
    space, shown, _ = NUMBERS[kind]
    with environment(space, shown, "state") as env:
        row, _ = env.reset()
        agent = agent_of(env.spec)
    action = agent.act(shown)
    agent.reset()
    np.testing.assert_array_equal(agent.act({"vector": row.obs["vector"][0]}), action)
    with pytest.raises(ValueError, match="the agent"):
        agent.act({"nothing": np.zeros(2)})


def test_an_image_that_training_drew_is_given_beside_the_numbers() -> None:
    with environment(box(2, 2), np.ones((2, 2)), "both", image_size=16) as env:
        agent = agent_of(env.spec)
        frame = np.full((40, 30, 3), 9, np.uint8)
        first = agent.act({"image": frame, "vector": np.ones((2, 2))})
        agent.reset()
        row, _ = env.reset()
    same = {name: x[0] for name, x in row.obs.items()}
    np.testing.assert_array_equal(agent.act(same), first)


@pytest.mark.parametrize(
    ("space", "shown"),
    [
        (spaces.Discrete(3), 3),
        (spaces.Discrete(3), 0.5),
        (box(2), np.ones(3)),
        (box(2), "text"),
        (bytes_box(16, 24), GRAY / 255),
        (bytes_box(16, 24, 3), COLORS[..., :2]),
        (spaces.Box(0, 1, (16, 24), np.float32), GRAY),
        (spaces.Box(0, 1, (16, 24), np.float32), np.full((16, 24), np.nan)),
        (spaces.Tuple((box(1), box(1))), (np.ones(1),)),
        (spaces.Dict(a=box(1)), np.ones(1)),
    ],
)
def test_an_observation_outside_its_space_is_an_error(space: Any, shown: Any) -> None:
    entries = entries_of(space, "pixels") or entries_of(space, "state")
    with pytest.raises(ObservationError):
        read(entries, shown)


def test_what_is_not_used_as_it_is_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "latentplan")
    space = spaces.Dict(left=bytes_box(5, 16, 24), right=bytes_box(16, 24))
    shown = {"left": np.stack([GRAY] * 5), "right": GRAY}
    with environment(space, shown, "pixels"):
        assert "'left' is a stack of 5 frames, of which the newest is used" in caplog.text
        assert "the images 'left', 'right' are put side by side" in caplog.text
    with environment(spaces.Dict(a=box(2), go=spaces.Text(5)), {"a": [1, 2], "go": "up"}, "state"):
        assert "'go' is a text, which the agent does not see" in caplog.text


LARGEST = float(np.finfo(np.float32).max)
TYPES = [np.float16, np.float32, np.float64]


@pytest.mark.parametrize("dtype", TYPES)
def test_the_environment_contains_every_action(dtype: Any) -> None:
    low, high = np.array([[-0.3], [-1 / 3]], dtype), np.array([[0.1], [2 / 3]], dtype)
    actions = spaces.Box(low, high, dtype=dtype)
    with environment(box(1), np.zeros(1), "state", actions, repeat=1) as env:
        env.reset()
        agent = agent_of(env.spec)
        for unit in (-1.0, -0.9999999, 0.0, 0.3, 0.9999999, 1.0):
            action = np.full(2, unit, np.float32)
            env.step(action[None])  # which asserts it
            command = agent.to_env(action)
            assert actions.contains(command)
            np.testing.assert_array_equal(command, Shows.last)
    np.testing.assert_array_equal(Shows.last, high)


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.uint8, np.int64])
def test_integer_actions_get_equal_shares(dtype: Any) -> None:
    actions = spaces.Box(0, 4, (1,), dtype)
    with environment(box(1), np.zeros(1), "state", actions, repeat=1) as env:
        env.reset()
        seen = []
        for unit in np.linspace(-1, 1, 501):
            env.step(np.array([[unit]]))
            seen.append(int(Shows.last[0]))
    assert np.bincount(seen).tolist() == pytest.approx([100] * 5, abs=1)


@pytest.mark.parametrize(
    ("actions", "words"),
    [
        (spaces.Box(-np.inf, np.inf, (2,)), "no bounds in 2 of 2 dimensions.*TransformAction"),
        (spaces.Box(np.float32([-1, -np.inf]), np.float32([1, 1])), "1 of 2"),
        (spaces.Box(np.float32([-1, 0]), np.float32([np.inf, 1])), "1 of 2"),
        (spaces.Box(-LARGEST, LARGEST, (1,)), "no bounds"),
        (spaces.Box(-1e10, 1e10, (1,)), "no bounds"),
        (spaces.Box(-65504, 65504, (1,), np.float16), "no bounds"),
        (spaces.Box(-(2**31), 2**31 - 1, (1,), np.int32), "no bounds"),
        (spaces.Discrete(5000), "5000 discrete actions, and at most 4096"),
        (spaces.MultiBinary(3), "MultiBinary"),
        (spaces.Tuple((spaces.Discrete(3), box(1))), "Tuple"),
        (spaces.Box(0, 1, (1,), np.bool_), "bool"),
    ],
)
def test_actions_without_bounds_are_refused(actions: Any, words: str) -> None:
    with pytest.raises(UserError, match=words), environment(box(1), None, "state", actions):
        pass


@pytest.mark.parametrize(
    ("index", "wrong"),
    [
        (0, "a"),
        (0, [None]),
        (1, "eval"),
        (2, [-1]),
        (2, [2, 2]),
        (3, "object"),
        (4, [10**9]),
        (4, [2, 2]),
        (5, [2**60]),
        (6, 0),
    ],
)
def test_entries_of_a_strangers_file_are_checked(index: int, wrong: Any) -> None:
    entry = [["a"], "one_hot", [1], "int64", [4], [0], 255]
    plain = EnvSpec({"vector": ((4,), "float32")}, 1, 1).to_dict()
    assert _spec({**plain, "entries": [entry]}, 16).entries[0].counts == (4,)
    entry[index] = wrong
    with pytest.raises(Exception, match="entr"):
        _spec({**plain, "entries": [entry]}, 16)
    for key, value in (("action_shape", [2]), ("action_dtype", "object"), ("entries", 5)):
        with pytest.raises(Exception, match=key):
            _spec({**plain, key: value}, 16)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("action_groups", [2, 2]),
        ("action_groups", [5, 0]),
        ("action_groups", "5"),
        ("action_low", [0.0] * 5),
        ("action_shape", [5]),
        ("action_names", ["a", "b"]),
        ("action_names", ["a"] * 4 + ["b" * 41]),
        ("action_names", [1] * 5),
    ],
)
def test_discrete_actions_of_a_strangers_file_are_checked(key: str, value: Any) -> None:
    known = {"action_low": [0.0] * 2, "action_high": [1.0, 2.0], "action_shape": [2]}
    spec = EnvSpec({"vector": ((4,), "float32")}, 5, 1, action_groups=(2, 3))
    plain = {**spec.to_dict(), **known, "action_names": list("abcde")}
    assert _spec(plain, 16).action_groups == (2, 3)
    with pytest.raises(Exception, match=key):
        _spec({**plain, key: value}, 16)
