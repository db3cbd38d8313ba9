"""Arguments of Gymnasium environments, and the camera of a dm_control task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from environments import make

from latentplan.config import yaml_text
from latentplan.config.loading import (
    as_config,
    flatten,
    load,
    load_resolved,
    to_override,
    to_yaml,
)
from latentplan.runs.resuming import identity
from latentplan.types import UserError

MODULE = """
import gymnasium
import numpy as np
from gymnasium import spaces


class Takes(gymnasium.Env):
    observation_space = spaces.Box(-9, 9, (3,), np.float32)
    action_space = spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, gain=1.0, names=("a",), label=None):
        self.shown = np.array([gain, len(names), label == "5"], np.float32)

    def reset(self, *, seed=None, options=None):
        return self.shown, {}

    def step(self, action):
        return self.shown, 0.0, False, False, {}


gymnasium.register("Takes-v0", Takes)
"""


@pytest.fixture
def module(tmp_path: Path) -> str:
    path = tmp_path / "mine.py"
    path.write_text(MODULE)
    return str(path)


@pytest.mark.parametrize("workers", [False, True])
def test_arguments_reach_the_environment(module: str, workers: bool) -> None:
    kwargs = {"gain": 2.5, "names": ["x", "y"], "label": "5"}
    with make("gym:Takes-v0", module=module, workers=workers, kwargs=kwargs) as env:
        row, _ = env.reset()
    np.testing.assert_array_equal(row.obs["vector"], [[2.5, 2, 1]])
    with pytest.raises(UserError, match="unexpected keyword argument 'gian'"):
        make("gym:Takes-v0", module=module, workers=workers, kwargs={"gian": 2})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5", 5),
        ("-0.5", -0.5),
        ("1e-3", 1e-3),
        (".inf", float("inf")),
        ("true", True),
        ("null", None),
        ("off", "off"),
        ("12:30", "12:30"),
        ("'5'", "5"),
        ('"1e-3"', "1e-3"),
        ("[0.7, .inf, 'a']", [0.7, float("inf"), "a"]),
    ],
)
def test_values_of_arguments_keep_their_types(text: str, value: Any, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"env:\n  kwargs:\n    size: {text}\n    other: 1\n")
    settings = flatten(yaml_text.read_mapping(file, "study"))
    for config in (
        load([], [to_override(key, text) for key, text in settings.items()]),
        load([], [f"env.kwargs.size={text}", "env.kwargs.other=1"]),
        load([file]),
        load([file], ["env.kwargs.other=2", "env.kwargs={other: 1}"]),
        as_config({"env": {"kwargs": {"size": value}}, "env.kwargs.other": 1}),
    ):
        assert config.env.kwargs == {"size": value, "other": 1}
        assert type(config.env.kwargs["size"]) is type(value)
        (tmp_path / "config.yaml").write_text(to_yaml(config))
        assert load_resolved(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    "item",
    [
        "env.kwargs.size={a: 1}",
        "env.kwargs.a.b=1",
        "env.kwargs=5",
        "env.kwargs.a-b=1",
        "env.kwargs.=1",
    ],
)
def test_other_arguments_are_refused(item: str) -> None:
    with pytest.raises(UserError, match=r"env\.kwargs must be names with plain values"):
        load([], [item])


def test_arguments_identify_a_run() -> None:
    one, other = (identity(load([], [f"env.kwargs.gain={x}"])) for x in (1, 2))
    assert one != other and one["env.kwargs"] == {"gain": 1}


def test_a_camera_is_chosen_by_name_or_number() -> None:
    images = {}
    for camera in ("", "0", "side", "1", "back"):
        with make("walker_walk", "pixels", workers=True, image_size=32, camera=camera) as env:
            images[camera] = env.reset()[0].obs["image"]
    for same, other in (("0", "side"), ("", "0"), ("1", "back")):
        np.testing.assert_array_equal(images[same], images[other])
    assert (images["0"] != images["1"]).any()


@pytest.mark.parametrize("camera", ["2", "-1", "top", "²"])
def test_a_camera_that_does_not_exist_is_answered_with_the_list(camera: str) -> None:
    with pytest.raises(UserError, match=r"does not exist: use 0 \(side\), 1 \(back\)"):
        make("walker_walk", "state", workers=True, camera=camera)


def test_cameras_and_arguments_are_for_their_suites() -> None:
    with pytest.raises(UserError, match=r"env\.kwargs\.camera_name"):
        make("gym:Pendulum-v1", camera="0")
    with pytest.raises(UserError, match="gym: environments"):
        make("walker_walk", kwargs={"a": 1})
