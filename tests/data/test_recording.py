"""Recorded rows are read from a folder that does not change."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from latentplan.data.recording import Recording
from latentplan.data.replay import Replay
from latentplan.types import EnvSpec, Timestep, UserError

SPEC = EnvSpec({"image": ((4, 4, 3), "uint8"), "vector": ((2,), "float32")}, 3, 1)
LENGTH = 5  # rows of an episode


def row(step: int, envs: int) -> Timestep:
    """Row ``step`` of every environment. All values tell the step and the environment."""
    values = (1000 * np.arange(envs) + step).astype(np.float32)
    return Timestep(
        obs={
            "image": np.full((envs, 4, 4, 3), step % 256, np.uint8),
            "vector": np.stack([values, values], 1),
        },
        prev_action=np.full((envs, 3), step / 1000, np.float32),
        reward=values,
        is_first=np.full(envs, step % LENGTH == 0),
        is_terminal=np.full(envs, step % LENGTH == LENGTH - 1),
    )


def record(folder: Path, rows: int, *, envs: int = 2, capacity: int = 40) -> Path:
    replay = Replay(folder, SPEC, capacity=capacity, envs=envs)
    for step in range(rows):
        replay.add(row(step, envs), np.full(envs, step // LENGTH))
    replay.close()
    return folder


def copy(folder: Path, to: Path, spec: EnvSpec = SPEC) -> tuple[Timestep, np.ndarray]:
    """The rows (T, ...) of a copy, and the numbers of their episodes (T,)."""
    recording = Recording(folder)
    recording.check(spec)
    replay = Replay(to, spec, capacity=200, envs=1)
    copied = recording.copy_to(replay)
    history = replay.history().map(lambda x: x[0])
    (rows, episode) = replay.sample(300, 1, np.random.default_rng(0))
    numbers = dict(zip(rows.reward[:, 0].tolist(), episode[:, 0].tolist(), strict=True))
    replay.close()
    assert copied.rows == len(history.reward) and copied.episodes == history.is_first.sum()
    return history, np.array([numbers[x] for x in history.reward.tolist()])


def content(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {x.name: (x.read_bytes(), x.stat().st_mtime_ns) for x in folder.iterdir()}


def test_all_rows_are_copied_and_the_folder_does_not_change(tmp_path: Path) -> None:
    folder = record(tmp_path / "there", 12)
    (folder / "lock").unlink()  # a folder without one gets none
    before = content(folder)
    folder.chmod(0o500)
    history, episode = copy(folder, tmp_path / "here")
    folder.chmod(0o700)
    assert content(folder) == before
    assert history.reward.tolist() == [*range(12), *range(1000, 1012)]
    assert episode.tolist() == [*[0] * 5, *[1] * 5, *[2] * 2, *[3] * 5, *[4] * 5, *[5] * 2]
    assert (history.obs["vector"] == history.reward[:, None]).all()
    assert (history.obs["image"][:, 0, 0, 0] == history.reward % 1000).all()
    np.testing.assert_allclose(history.prev_action[:, 0], history.reward % 1000 / 1000, rtol=1e-6)
    assert (history.is_first == (history.reward % 1000 % LENGTH == 0)).all()
    assert (history.is_terminal == (history.reward % 1000 % LENGTH == LENGTH - 1)).all()


def test_a_part_of_the_observations_may_be_copied(tmp_path: Path) -> None:
    folder = record(tmp_path / "there", 12)
    spec = SPEC._replace(obs={"vector": SPEC.obs["vector"]})
    history, _ = copy(folder, tmp_path / "here", spec)
    assert set(history.obs) == {"vector"} and len(history.reward) == 24


def test_an_episode_without_its_beginning_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A full ring has overwritten rows 0 to 7, and row 8 is in the middle of an episode."""
    folder = record(tmp_path / "there", 18, envs=1, capacity=10)
    with caplog.at_level(logging.WARNING, "latentplan"):
        history, _ = copy(folder, tmp_path / "here")
    assert history.reward.tolist() == list(range(10, 18))
    assert "2 of 10 rows" in caplog.text


def test_damage_costs_the_rest_of_its_episode(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = record(tmp_path / "there", 15, envs=1)
    with (folder / "reward.bin").open("r+b") as file:
        file.seek(4 * 6)  # row 6, the second of its episode
        file.write(b"\x01")
    with (folder / "is_first.bin").open("r+b") as file:
        file.seek(10)
        file.write(b"\0")  # the first row of the third episode
    with caplog.at_level(logging.WARNING, "latentplan"):
        history, _ = copy(folder, tmp_path / "here")
    assert history.reward.tolist() == [0, 1, 2, 3, 4, 5]
    assert "9 of 15 rows" in caplog.text


def test_rows_without_a_checksum_are_not_read(tmp_path: Path) -> None:
    """The run that writes them is still training."""
    folder = record(tmp_path / "there", 5, envs=1)
    replay = Replay(folder, SPEC, capacity=40, envs=1)
    replay.add(row(5, 1), np.ones(1))
    assert len(Recording(folder)) == 5
    replay.close()
    assert len(Recording(folder)) == 6


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (
            SPEC._replace(obs={"vector": ((3,), "float32")}),
            r"has float32\(2,\), but the task needs vector float32\(3,\)",
        ),
        (
            SPEC._replace(obs={"image": ((8, 8, 3), "uint8")}),
            r"has uint8\(4, 4, 3\), but the task needs image uint8\(8, 8, 3\)",
        ),
        (SPEC._replace(obs={"touch": ((2,), "float32")}), "has no touch, but the task needs touch"),
        (SPEC._replace(action_dim=2), r"actions of shape \(3,\), but the task needs \(2,\)"),
    ],
)
def test_other_shapes_are_named(tmp_path: Path, spec: EnvSpec, words: str) -> None:
    recording = Recording(record(tmp_path / "there", 5))
    with pytest.raises(UserError, match=words):
        recording.check(spec)


def test_what_is_no_recording_is_one_sentence(tmp_path: Path) -> None:
    folder = record(tmp_path / "there" / "replay", 12)
    with pytest.raises(UserError, match=r"there is not a recording.*name its folder .*replay"):
        Recording(folder.parent)
    with pytest.raises(UserError, match=r"nowhere is not a recording, it has no replay\.json\."):
        Recording(tmp_path / "nowhere")
    description = folder / "replay.json"
    text = description.read_text()
    meta = json.loads(text)
    fields = meta["fields"]
    for change in (
        {"envs": -1},
        {"envs": 0},
        {"rows": 0},
        {"spare": -1},
        {"fields": {**fields, "obs.vector": [[0], "float32"]}},
        {"fields": {**fields, "obs.vector": [[2**50], "float32"]}},
        {"rows": 2**70},
        {"format": 9},
        {"fields": {**fields, "obs.../../x": [[2], "float32"]}},
        {"fields": {**fields, "obs.vector": [[2], "object"]}},
        {"fields": {**fields, "reward": [[2], "float32"]}},
        {"fields": {name: x for name, x in fields.items() if name != "prev_action"}},
        {"fields": 3},
    ):
        description.write_text(json.dumps({**meta, **change}))
        with pytest.raises(UserError, match=r"replay\.json is damaged"):
            Recording(folder)
    description.write_text("[" * 5000)
    with pytest.raises(UserError, match=r"replay\.json is damaged"):
        Recording(folder)
    description.write_text(json.dumps({**meta, "format": 1}))
    with pytest.raises(UserError, match="earlier version"):
        Recording(folder)
    description.write_text(text)
    counters = (folder / "counters.bin").read_bytes()
    (folder / "counters.bin").write_bytes(b"\x07" + counters[1:])
    with pytest.raises(UserError, match="counters of the recording"):
        Recording(folder)
    (folder / "counters.bin").write_bytes(counters)
    (folder / "reward.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"reward\.bin is missing or cut short"):
        Recording(folder)
