"""Minari data sets, recorded here with the library itself."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from latentplan.cli.main import main
from latentplan.data.recording import Recording
from latentplan.data.replay import Replay
from latentplan.datasets.episodes import write
from latentplan.datasets.minari_episodes import MinariEpisodes
from latentplan.types import Timestep, UserError

LENGTH = 4
pytestmark = pytest.mark.filterwarnings("ignore")  # minari asks for an author and a description


class Counter(gymnasium.Env):
    """Observes its frame and the last action. Episodes terminate, and every second is cut."""

    observation_space: spaces.Space = spaces.Dict(
        {
            "pair": spaces.Box(-np.inf, np.inf, (2,), np.float64),
            "frame": spaces.Box(0, 99, (1,), np.float32),
            "camera": spaces.Box(0, 255, (16, 16, 3), np.uint8),
        }
    )
    action_space: spaces.Space = spaces.Box(
        np.array([0, -4], np.float32), np.array([2, 4], np.float32)
    )

    def __init__(self) -> None:
        self.episode, self.frame = -1, 0

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        self.episode, self.frame = self.episode + 1, 0
        return self._observe(np.zeros(2)), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.frame += 1
        ended, odd = self.frame == LENGTH, self.episode % 2 == 1
        return self._observe(action), float(self.frame), ended and not odd, ended and odd, {}

    def _observe(self, action: Any) -> Any:
        return {
            "pair": np.asarray(action, np.float64),
            "frame": np.array([self.frame], np.float32),
            "camera": np.full((16, 16, 3), 10 * self.frame, np.uint8),
        }


class Plain(Counter):
    """Observes one vector."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)

    def _observe(self, action: Any) -> Any:
        return np.asarray(action, np.float32)


class Discrete(Plain):
    action_space = spaces.Discrete(2, start=5)

    def _observe(self, action: Any) -> Any:
        return np.zeros(2, np.float32)


class Binary(Discrete):
    action_space = spaces.MultiBinary(2)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which minari keeps data sets."""
    pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "datasets"))
    return tmp_path / "datasets"


def record(env: Counter, name: str, episodes: int = 3) -> np.ndarray:
    """Record random episodes, and return their actions (episodes, T, A)."""
    import minari
    from minari.data_collector import EpisodeBuffer

    env.action_space.seed(0)
    buffers = []
    for number in range(episodes):
        observations, steps = [env.reset()[0]], []
        for _ in range(LENGTH):
            action = env.action_space.sample()
            observation, *outcome, _ = env.step(action)
            observations.append(observation)
            steps.append((action, *outcome))
        buffers.append(
            EpisodeBuffer(
                number, None, None, stack(observations), *map(list, zip(*steps, strict=True))
            )
        )
    minari.create_dataset_from_buffers(
        name,
        buffers,
        observation_space=env.observation_space,
        action_space=env.action_space,
        jpeg_encoding=False,
    )
    return np.array([buffer.actions for buffer in buffers])


def stack(observations: list[Any]) -> Any:
    """Observations as minari stores them: the entries of a Dict by name."""
    if not isinstance(observations[0], dict):
        return observations
    return {name: [x[name] for x in observations] for name in observations[0]}


def read(folder: Path, to: Path) -> Timestep:
    recording = Recording(folder)
    replay = Replay(to, recording.spec, capacity=len(recording), envs=1)
    recording.copy_to(replay)
    history = replay.history().map(lambda x: x[0])
    replay.close()
    return history


def test_a_data_set_is_imported_by_its_identifier(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    actions = record(Counter(), "test/counter-v0")
    out = tmp_path / "out"
    assert main(["import", "minari", "test/counter-v0", "--out", str(out)]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["episodes"], summary["rows"], summary["mean_return"]) == (3, 15, 10.0)
    rows = read(out, tmp_path / "replay")
    shape = (3, LENGTH + 1)
    frames = np.broadcast_to(np.arange(LENGTH + 1), shape)
    vector = rows.obs["vector"].reshape(*shape, 3)  # the frame, then the pair
    np.testing.assert_array_equal(vector[..., 0], frames)
    np.testing.assert_allclose(vector[:, 1:, 1:], actions, rtol=1e-6)
    np.testing.assert_array_equal(rows.obs["image"][:, 0, 0, 0].reshape(shape), 10 * frames)
    scaled = (actions - [0, -4]) / [2, 8] * 2 - 1
    np.testing.assert_allclose(rows.prev_action.reshape(*shape, 2)[:, 1:], scaled, atol=1e-6)
    np.testing.assert_array_equal(rows.reward.reshape(shape), frames)
    assert rows.is_first.reshape(shape)[:, 0].all() and rows.is_first.sum() == 3
    assert rows.is_terminal.reshape(shape)[:, -1].tolist() == [True, False, True]
    assert rows.is_terminal.sum() == 2


def test_a_folder_is_imported_too(home: Path, tmp_path: Path) -> None:
    actions = record(Plain(), "plain-v0", episodes=2)
    for number, folder in enumerate((home / "plain-v0", home / "plain-v0" / "data")):
        out = tmp_path / f"out{number}"
        write(MinariEpisodes(str(folder)), out)
        rows = read(out, tmp_path / f"replay{number}")
        assert set(rows.obs) == {"vector"}
        vector = rows.obs["vector"].reshape(2, LENGTH + 1, 2)
        np.testing.assert_allclose(vector[:, 1:], actions, rtol=1e-6)


def test_other_spaces_are_refused(home: Path) -> None:
    record(Binary(), "binary-v0")
    with pytest.raises(UserError, match=r"its actions are MultiBinary\(2\)"):
        MinariEpisodes("binary-v0")


def test_discrete_actions_become_one_hot(home: Path, tmp_path: Path) -> None:
    actions = record(Discrete(), "discrete-v0", episodes=2)
    write(MinariEpisodes("discrete-v0"), tmp_path / "out")
    assert Recording(tmp_path / "out").spec.action_groups == (2,)
    rows = read(tmp_path / "out", tmp_path / "replay")
    prev_action = rows.prev_action.reshape(2, LENGTH + 1, 2)
    np.testing.assert_array_equal(prev_action[:, 1:], np.eye(2)[np.asarray(actions) - 5])
    assert not prev_action[:, 0].any()


def test_a_data_set_runs_no_code(home: Path) -> None:
    """Without spaces, minari would build the environment whose name the data set gives."""
    record(Plain(), "plain-v0")
    path = home / "plain-v0" / "data" / "metadata.json"
    described = json.loads(path.read_text())
    for name in ("observation_space", "action_space"):
        path.write_text(json.dumps({k: x for k, x in described.items() if k != name}))
        with pytest.raises(UserError, match="does not say what its observations and actions are"):
            MinariEpisodes("plain-v0")


def test_what_cannot_be_read_is_one_sentence(home: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a folder nor a Minari data set"):
        MinariEpisodes("nobody/nothing-v0")
    with pytest.raises(UserError, match="cannot be read"):
        MinariEpisodes(str(tmp_path))
    record(Plain(), "plain-v0")
    (home / "plain-v0" / "data" / "metadata.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        MinariEpisodes("plain-v0")


def test_the_package_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "minari", None)
    with pytest.raises(UserError, match=r"\.\[minari\]"):
        MinariEpisodes("plain-v0")
