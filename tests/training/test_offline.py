"""Training on recorded rows alone."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from test_train import metrics, run_differences
from tiny import EPISODE, record_results, run_config

from latentplan.agent import Agent
from latentplan.cli.main import main
from latentplan.config.loading import load
from latentplan.deploy.loading import load as load_agent
from latentplan.envs import VectorEnv
from latentplan.runs import checkpoint, run_folder
from latentplan.training.session import train
from latentplan.types import UserError

QUIET = ("log.inspect_every=0", "eval.every=0")


@pytest.fixture(scope="module")
def recorded(run: Path) -> Path:
    """The replay of a run with images and state, without the rest of the run."""
    copy = run.parent / "recorded"
    shutil.copytree(run / "replay", copy)
    return copy


def content(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {x.name: (x.read_bytes(), x.stat().st_mtime_ns) for x in folder.iterdir()}


def test_a_run_learns_from_recorded_rows_without_a_step(
    recorded: Path,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """There are as many updates as in an online run without a prefill."""
    before = content(recorded)
    steps = record_results(monkeypatch, VectorEnv, "step_async")
    episodes = record_results(monkeypatch, VectorEnv, "reset")
    items = ("eval.every=128", "log.inspect_every=0", f"train.offline={recorded}")
    with caplog.at_level(logging.INFO, "latentplan"):
        folder = train(run_config(tmp_path / "run", *items))
    assert "offline: 68 rows of 4 episodes" in caplog.text
    assert len(episodes) == 2 * 2  # evaluations of the policy's mean and of its samples
    assert len(steps) == len(episodes) * EPISODE / 4
    assert content(recorded) == before
    saved = checkpoint.load(folder / "checkpoint.pt")
    assert saved["frames"] == 256 and saved["decisions"] == 64
    assert (
        saved["updates"] == (64 - 1) * 8 // 16
    )  # the last decision's are those of a later session
    rows = metrics(folder)
    assert [row["step"] for row in rows] == [64, 128, 192, 256]
    assert [("episode/eval_score" in row) for row in rows] == [False, True, False, True]
    assert rows[-1]["replay/rows"] == 68 and "episode/score" not in rows[-1]
    with run_folder.open_replay(folder) as own, run_folder.open_replay(run) as other:
        one, two = own.history(), other.history()
    assert set(one.obs) == {"vector"}
    np.testing.assert_array_equal(one.obs["vector"], two.obs["vector"])
    for a, b in zip(one[1:], two[1:], strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_resumed_run_equals_an_uninterrupted_one(recorded: Path, tmp_path: Path) -> None:
    """The recorded rows are needed only at the start."""
    there = Path(shutil.copytree(recorded, tmp_path / "there"))
    items = (f"train.offline={there}", "eval.every=128", "log.inspect_every=0")
    train(run_config(tmp_path / "whole", "steps=512", *items))
    train(run_config(tmp_path / "halves", "steps=256", *items))
    assert {"/frames", "metrics"} <= set(run_differences(tmp_path / "whole", tmp_path / "halves"))
    shutil.rmtree(there)
    assert main(["resume", str(tmp_path / "halves"), "steps=512"]) == 0
    assert run_differences(tmp_path / "whole", tmp_path / "halves") == []


def test_a_run_without_an_environment(
    recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It trains, films and resumes, and its agent can be used."""
    items = ("task=none", "obs=both", "log.inspect_every=128", "eval.every=64")
    folder = train(run_config(tmp_path / "run", *items, f"train.offline={recorded}"))
    assert main(["resume", str(folder), "steps=320"]) == 0
    saved = checkpoint.load(folder / "checkpoint.pt")
    assert saved["frames"] == 320 and saved["spec"]["repeat"] == 4
    assert not any("episode/eval_score" in row for row in metrics(folder))
    assert any("open_loop" in path.name for path in (folder / "videos").iterdir())
    agent = load_agent(folder)
    action = agent.act({"image": np.zeros((16, 16, 3), np.uint8), "vector": np.zeros(2)})
    assert action.shape == (2,)
    capsys.readouterr()
    assert main(["eval", str(folder)]) == 2
    assert "task=none has no environment" in capsys.readouterr().err


def test_other_shapes_are_refused_before_anything_is_written(
    recorded: Path, tmp_path: Path
) -> None:
    for items, words in (
        (["env.image_size=32", "obs=pixels"], r"uint8\(16, 16, 3\).*image uint8\(32, 32, 3\)"),
        (["task=dummy:count"], r"float32\(2,\).*vector float32\(4,\)"),
        (["task=cartpole_swingup"], r"float32\(2,\).*vector float32\(5,\)"),
        (["replay.capacity=67"], r"has 68 rows: set replay\.capacity=68"),
    ):
        config = run_config(tmp_path / "run", f"train.offline={recorded}", *items)
        with pytest.raises(UserError, match=words):
            train(config)
        assert not (tmp_path / "run").exists()


def test_a_recording_that_is_too_short_is_refused(recorded: Path, tmp_path: Path) -> None:
    config = run_config(tmp_path / "run", f"train.offline={recorded}", "train.length=70")
    with pytest.raises(UserError, match=r"68 rows.*windows of 70"):
        train(config)
    assert not (tmp_path / "run").exists()


def test_the_recording_is_not_taken_for_the_replay_of_the_run(
    recorded: Path, tmp_path: Path
) -> None:
    there = Path(shutil.copytree(recorded, tmp_path / "run" / "replay"))
    before = content(there)
    with pytest.raises(UserError, match="would be overwritten"):
        train(run_config(tmp_path / "run", f"train.offline={there}"))
    assert content(there) == before


def test_a_task_without_environment_needs_recorded_rows(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"task=none has no environment, so it needs train\.offline"
    ):
        load([], ["task=none"])
    with pytest.raises(UserError, match=r"leave env\.num_envs at 1"):
        load([], ["train.offline=x", "env.num_envs=2"])
    assert load([], ["task=none", "train.offline=x"]).run_dir.startswith("runs/none-pixels")


def test_an_offline_agent_goes_on_online(recorded: Path, tmp_path: Path) -> None:
    offline = train(run_config(tmp_path / "a", *QUIET, f"train.offline={recorded}"))
    items = (*QUIET, f"train.init_from={offline}", "steps=64", "train.prefill=0")
    online = train(run_config(tmp_path / "b", *items, "train.ratio=0.001"))
    a, b = (checkpoint.load(x / "checkpoint.pt")["agent"] for x in (offline, online))
    assert all(torch.equal(a[x], b[x]) for x in a if x.startswith(("actor.", "world.")))


def test_skipped_batches_are_counted(
    recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = Agent._require_finite, []

    def require(self: Agent, terms: dict[str, torch.Tensor]) -> None:
        calls.append(1)
        if len(calls) == 3:
            terms = {**terms, "rew": torch.tensor(float("nan"))}
        original(self, terms)

    monkeypatch.setattr(Agent, "_require_finite", require)
    folder = train(run_config(tmp_path / "run", *QUIET, f"train.offline={recorded}"))
    assert metrics(folder)[-1]["train/skipped_batches"] == 1
