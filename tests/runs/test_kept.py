"""Checkpoints of the best evaluation, and periodic ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import VECTOR, agent_config, run_config

from latentplan.agent import Agent
from latentplan.runs import checkpoint, kept
from latentplan.runs.kept import KeptCheckpoints
from latentplan.training.monitor import Monitor
from latentplan.training.session import train
from latentplan.types import UserError


def frames_of(folder: Path, name: str) -> int:
    return checkpoint.load(kept.path_of(folder, name))["frames"]


def test_the_best_evaluation_is_kept(tmp_path: Path) -> None:
    agent = Agent(VECTOR, agent_config())
    keep = KeptCheckpoints(tmp_path, 0, 0, None)
    for frames, score, best in ((10, None, None), (20, 3.0, 20), (30, 2.0, 20), (40, 5.0, 40)):
        keep.report(agent, frames, score)
        if best is None:
            assert not (tmp_path / "checkpoints").exists()
        else:
            assert frames_of(tmp_path, "best") == best
    assert keep.best_score == 5.0
    saved = checkpoint.load(kept.path_of(tmp_path, "best"))
    assert saved["score"] == 5.0 and saved["spec"] == agent.world.spec.to_dict()
    assert all(torch.equal(x, saved["agent"][name]) for name, x in agent.state_dict().items())
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["best.pt"]


def test_a_run_that_goes_on_keeps_its_best_score(tmp_path: Path) -> None:
    agent = Agent(VECTOR, agent_config())
    KeptCheckpoints(tmp_path, 0, 0, None).report(agent, 20, 3.0)
    KeptCheckpoints(tmp_path, 0, 20, 3.0).report(agent, 30, 2.0)
    assert frames_of(tmp_path, "best") == 20


def test_periodic_checkpoints_are_kept_on_a_grid(tmp_path: Path) -> None:
    agent = Agent(VECTOR, agent_config())
    keep = KeptCheckpoints(tmp_path, 100, 0, None)
    for frames in (60, 120, 180, 240):
        keep.report(agent, frames, None)
    KeptCheckpoints(tmp_path, 100, 240, None).report(agent, 260, None)
    KeptCheckpoints(tmp_path, 100, 240, None).report(agent, 320, None)
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"frame-120.pt", "frame-240.pt", "frame-320.pt"}
    assert frames_of(tmp_path, "240") == 240


@pytest.mark.parametrize("name", ["10", "../../checkpoint", "/etc/passwd", "", "frame-120"])
def test_other_names_are_refused_with_those_that_are_there(tmp_path: Path, name: str) -> None:
    agent = Agent(VECTOR, agent_config())
    keep = KeptCheckpoints(tmp_path, 100, 0, None)
    for frames in (120, 1000):
        keep.report(agent, frames, 1.0)
    with pytest.raises(UserError, match=r"kept checkpoints: 120, 1000, best\."):
        kept.path_of(tmp_path, name)
    with pytest.raises(UserError, match=r"kept checkpoints: none\."):
        kept.path_of(tmp_path / "other", name)


def test_a_run_keeps_the_agent_of_its_best_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([1.0, 7.0, 3.0, 2.0])
    evaluated: list[tuple[int, float]] = []

    def evaluate(self: Monitor, frames: int, last: bool) -> float:
        evaluated.append((frames, next(scores)))
        return evaluated[-1][1]

    monkeypatch.setattr(Monitor, "_evaluate", evaluate)
    folder = tmp_path / "run"
    settings: list[Any] = ["eval.every=96", "log.keep=100"]
    train(run_config(folder, "steps=192", *settings))
    train(run_config(folder, "steps=256", *settings))
    (best,) = (frames for frames, score in evaluated if score == 7.0)
    assert frames_of(folder, "best") == best
    assert checkpoint.load(folder / "checkpoint.pt")["best_score"] == 7.0
    kept_frames = {
        frames_of(folder, path.stem.removeprefix("frame-"))
        for path in (folder / "checkpoints").glob("frame-*.pt")
    }
    assert len(kept_frames) == 2
