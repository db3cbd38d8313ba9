"""Episodes in npz files become a folder that training reads."""

from __future__ import annotations

import json
import pickle
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import run_config

from latentplan.cli.main import main
from latentplan.data.recording import Recording
from latentplan.data.replay import Replay
from latentplan.datasets.episodes import write
from latentplan.datasets.npz_episodes import NpzEpisodes
from latentplan.runs import checkpoint, run_folder
from latentplan.runs.source import RunSource
from latentplan.training.session import train
from latentplan.types import Timestep, UserError


def episode(length: int = 3, **changes: Any) -> dict[str, Any]:
    """The arrays of an episode of ``length`` decisions; a change to None removes an array."""
    arrays = {
        "image": np.arange((length + 1) * 48).reshape(length + 1, 4, 4, 3).astype(np.uint8),
        "vector": np.arange((length + 1) * 2.0).reshape(length + 1, 2),
        "action": np.linspace(-1, 1, length * 3).reshape(length, 3),
        "reward": np.arange(1.0, length + 1),
        "terminated": np.arange(length) == length - 1,
        **changes,
    }
    return {key: x for key, x in arrays.items() if x is not None}


def save(folder: Path, *episodes: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, arrays in enumerate(episodes):
        np.savez_compressed(folder / f"episode-{number:03d}.npz", **arrays)
    return folder


def read(folder: Path, to: Path) -> tuple[Timestep, int]:
    """The rows (T, ...) of an imported folder, and how many episodes they are."""
    recording = Recording(folder)
    replay = Replay(to, recording.spec, capacity=len(recording), envs=1)
    copied = recording.copy_to(replay)
    history = replay.history().map(lambda x: x[0])
    replay.close()
    return history, copied.episodes


def test_rows_have_the_action_and_reward_that_led_to_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    truncated = episode(2, terminated=np.zeros(2, bool), truncated=np.array([False, True]))
    source = save(tmp_path / "npz", episode(3), truncated)
    out = tmp_path / "new" / "imported"
    assert main(["import", "npz", str(source), "--out", str(out)]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "folder": str(out),
        "episodes": 2,
        "rows": 7,
        "spec": {
            "image": [[4, 4, 3], "uint8"],
            "vector": [[2], "float32"],
            "action": [3],
        },
        "mean_return": 4.5,
    }
    rows, episodes = read(out, tmp_path / "replay")
    assert episodes == 2
    assert rows.is_first.tolist() == [True, *[False] * 3, True, False, False]
    assert rows.is_terminal.tolist() == [*[False] * 3, True, *[False] * 3]
    assert rows.reward.tolist() == [0, 1, 2, 3, 0, 1, 2]
    for arrays, part in ((episode(3), slice(0, 4)), (truncated, slice(4, 7))):
        np.testing.assert_array_equal(rows.obs["image"][part], arrays["image"])
        np.testing.assert_array_equal(rows.obs["vector"][part], arrays["vector"])
        action = rows.prev_action[part]
        np.testing.assert_array_equal(action[1:], arrays["action"].astype(np.float32))
        assert not action[0].any()
    assert [path.name for path in out.parent.iterdir()] == ["imported"]  # no scratch is left


def export(history: Timestep, folder: Path) -> Path:
    """Write the rows (T, ...) of a replay as npz episodes."""
    starts = [*np.flatnonzero(history.is_first), len(history.reward)]
    parts = [history.map(lambda x, a=a, b=b: x[a:b]) for a, b in pairwise(starts)]
    return save(
        folder,
        *(
            {
                **rows.obs,
                "action": rows.prev_action[1:],
                "reward": rows.reward[1:],
                "is_terminal": rows.is_terminal,
            }
            for rows in parts
        ),
    )


@pytest.mark.parametrize("task", ["dummy:count", "dummy:pixels"])
def test_the_replay_of_a_run_makes_a_round_trip(task: str, tmp_path: Path) -> None:
    """Some episodes of dummy:count terminate, and others are truncated."""
    items = (f"task={task}", "obs=both", "log.inspect_every=0", "eval.every=0", "env.repeat=1")
    run = train(run_config(tmp_path / "run", *items, "steps=128", "train.length=4"))
    with run_folder.open_replay(run) as replay:
        history = replay.history().map(lambda x: x[0])
    whole = np.flatnonzero(history.is_first)[-1]  # a last episode of one row has no decision
    history = history if whole < len(history.reward) - 1 else history.map(lambda x: x[:whole])
    source = export(history, tmp_path / "npz")
    write(NpzEpisodes(source), tmp_path / "imported")
    rows, episodes = read(tmp_path / "imported", tmp_path / "replay")
    assert episodes == history.is_first.sum() > 1
    assert task == "dummy:pixels" or 0 < rows.is_terminal.sum() < episodes
    assert set(rows.obs) == set(history.obs)
    for name, x in history.obs.items():
        np.testing.assert_array_equal(rows.obs[name], x)
    for one, other in zip(rows[1:], history[1:], strict=True):
        np.testing.assert_array_equal(one, other)
    items = (*items, f"train.offline={tmp_path / 'imported'}", "steps=32", "train.length=4")
    offline = train(run_config(tmp_path / "offline", *items))
    assert checkpoint.load(offline / "checkpoint.pt")["updates"] > 10


NAN = np.full(3, np.nan)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"action": None}, r"000\.npz has no array action\."),
        ({"reward": None}, r"has no array reward\."),
        ({"terminated": None}, r"has no array terminated \(or is_terminal"),
        ({"image": None, "vector": None}, "has neither image nor vector"),
        ({"reward": np.zeros(4)}, "reward has 4 rows but must have 3"),
        ({"vector": np.zeros((3, 2))}, "vector has 3 rows but must have 4"),
        ({"vector": np.zeros(4)}, r"vector must be numbers with two axes.*float64 \(4,\)"),
        ({"image": np.zeros((4, 4, 4, 3))}, r"image must be uint8 .*not float64 \(4, 4, 4, 3\)"),
        ({"image": np.zeros((4, 4, 4, 1), np.uint8)}, "image must be uint8"),
        ({"action": np.zeros(3)}, "action must be numbers with two axes"),
        ({"action": np.zeros((3, 3), complex)}, "action must be numbers"),
        ({"action": np.zeros((0, 3))}, "holds no decision"),
        ({"action": np.full((3, 3), 2.5)}, r"an action of 2\.5 is outside \[-1, 1\]"),
        ({"action": np.full((3, 3), np.nan)}, "action is not finite in row 0"),
        ({"reward": NAN}, "reward is not finite in row 0"),
        ({"reward": np.array([0, 0, 1e300])}, "reward is not finite in row 2"),
        ({"vector": np.full((4, 2), np.inf)}, "vector is not finite in row 0"),
        ({"terminated": np.zeros(3)}, r"terminated must be bool \(3,\), not float64 \(3,\)"),
        ({"terminated": np.zeros(4, bool)}, r"terminated must be bool \(3,\)"),
        ({"terminated": np.array([True, False, False])}, "terminated is true in row 0"),
        ({"truncated": np.array([False, True, False])}, "truncated is true in row 1"),
        ({"is_terminal": np.zeros(3, bool)}, r"is_terminal must be bool \(4,\)"),
        ({"reward": np.array(["a", "b", "c"])}, "reward must be numbers"),
        ({"reward": np.array([1, None, 2], object)}, "cannot be read.*allow_pickle"),
    ],
)
def test_each_mistake_is_one_sentence_and_leaves_nothing(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    source = save(tmp_path / "npz", episode(3, **changes))
    with pytest.raises(UserError, match=words):
        write(NpzEpisodes(source), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["npz"]


def test_all_episodes_have_the_same_shapes(tmp_path: Path) -> None:
    other = episode(3, vector=np.zeros((4, 5)))
    source = save(tmp_path / "npz", episode(3), other)
    words = r"Episode 1 has .*vector float32\(5,\).*but those before it have .*float32\(2,\)"
    with pytest.raises(UserError, match=words):
        write(NpzEpisodes(source), tmp_path / "out")


def test_files_that_are_not_npz_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "npz"
    with pytest.raises(UserError, match="is not a folder"):
        NpzEpisodes(folder)
    folder.mkdir()
    with pytest.raises(UserError, match=r"has no \.npz files"):
        NpzEpisodes(folder)
    for content in (b"", b"text", pickle.dumps({"action": 1}), b"PK\x03\x04damaged"):
        (folder / "a.npz").write_bytes(content)
        with pytest.raises(UserError, match=r"a\.npz cannot be read"):
            list(NpzEpisodes(folder))


def test_a_folder_with_files_is_not_overwritten(tmp_path: Path) -> None:
    source = save(tmp_path / "npz", episode())
    with pytest.raises(UserError, match="exists and is not empty"):
        write(NpzEpisodes(source), source)
    (tmp_path / "empty").mkdir()
    write(NpzEpisodes(source), tmp_path / "empty")
    assert len(Recording(tmp_path / "empty")) == 4


def test_actions_may_exceed_the_bounds_by_rounding(tmp_path: Path) -> None:
    source = save(tmp_path / "npz", episode(3, action=np.full((3, 3), 1 + 1e-6)))
    write(NpzEpisodes(source), tmp_path / "out")
    rows, _ = read(tmp_path / "out", tmp_path / "replay")
    assert (rows.prev_action[1:] == 1).all()


# --- discrete actions ------------------------------------------------------------------------


CHOSEN = np.array([[0, 2], [1, 0], [1, 1]])


def test_integers_become_one_hot_actions(tmp_path: Path) -> None:
    one = episode(3, action=CHOSEN, action_groups=np.array([2, 3]))
    out = tmp_path / "out"
    write(NpzEpisodes(save(tmp_path / "npz", one)), out)
    assert Recording(out).spec.action_groups == (2, 3)
    rows, _ = read(out, tmp_path / "replay")
    expected = [[0] * 5, [1, 0, 0, 0, 1], [0, 1, 1, 0, 0], [0, 1, 0, 1, 0]]
    assert rows.prev_action.tolist() == expected


def test_a_run_learns_from_discrete_actions_without_an_environment(tmp_path: Path) -> None:
    one = episode(20, image=None, action=np.arange(20) % 5, action_groups=np.array([5]))
    write(NpzEpisodes(save(tmp_path / "npz", one, one)), tmp_path / "out")
    more = (f"train.offline={tmp_path / 'out'}", "task=none", "obs=state", "steps=64")
    folder = train(run_config(tmp_path / "run", "train.prefill=0", "train.length=8", *more))
    agent, *_ = run_folder.load_agent(RunSource(folder))
    assert agent.world.spec.action_groups == agent.actor.groups == (5,)
    with pytest.raises(UserError, match=r"discrete actions \(5,\), but the task needs continuous"):
        spec = agent.world.spec._replace(action_groups=())
        Recording(tmp_path / "out").check(spec)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"action": np.zeros(3, int)}, "need an array action_groups"),
        ({"action": CHOSEN, "action_groups": np.array([2, 2])}, "not one of the choices"),
        ({"action": CHOSEN - 1, "action_groups": np.array([2, 3])}, "not one of the choices"),
        ({"action": CHOSEN, "action_groups": np.array([5])}, r"integers \(T, 1\)"),
        ({"action": CHOSEN * 1.0, "action_groups": np.array([2, 3])}, r"integers \(T, 2\)"),
        ({"action": CHOSEN, "action_groups": np.array([0, 3])}, "positive integers"),
        ({"action": CHOSEN, "action_groups": np.array([2, 10**6])}, "more than 4096"),
    ],
)
def test_wrong_discrete_actions_are_refused(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        list(NpzEpisodes(save(tmp_path / "npz", episode(3, **changes))))
