"""An exported policy acts as the agent of the run. Otherwise no file is written."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from tiny import run_config

from latentplan import load
from latentplan.cli.main import main
from latentplan.deploy import export as module
from latentplan.deploy.export import STATE, export
from latentplan.training.session import train
from latentplan.types import UserError


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run whose agent sees images and vectors."""
    return train(
        run_config(tmp_path_factory.mktemp("run") / "a", "obs=both", "log.inspect_every=0")
    )


def episode(run: Path, length: int = 12) -> tuple[list[dict], list[np.ndarray], list[np.ndarray]]:
    """Observations, the loaded agent's actions, and the random numbers of its posterior states."""
    rng, agent = np.random.default_rng(0), load(run)
    spec = agent.spec
    drawn = torch.Generator().manual_seed(0)
    observations = [
        {
            name: rng.integers(256, size=shape, dtype=np.uint8)
            if dtype == "uint8"
            else rng.normal(size=shape).astype(dtype)
            for name, (shape, dtype) in spec.obs.items()
        }
        for _ in range(length)
    ]
    uniform = [
        torch.rand(1, agent.config.world.stoch, generator=drawn).numpy() for _ in range(length)
    ]
    return observations, [agent.act(obs) for obs in observations], uniform


def start(run: Path) -> dict[str, np.ndarray]:
    """The state before an episode, made as the documentation says."""
    agent = load(run)
    world = agent.config.world
    shapes = (1, agent.spec.action_dim), (1, world.deter), (1, world.stoch, world.classes)
    return {k: np.zeros(shape, np.float32) for k, shape in zip(STATE, shapes, strict=True)}


def test_onnx_plays_an_episode_as_the_agent_does(run: Path, tmp_path: Path) -> None:
    report = export(run, tmp_path / "policy.onnx")
    session = onnxruntime.InferenceSession(report["path"])
    state = start(run)
    for obs, expected, uniform in zip(*episode(run), strict=True):
        inputs = {name: x[None] for name, x in obs.items()} | state | {"uniform": uniform}
        outputs = session.run(None, inputs)
        assert outputs[0][0] == pytest.approx(expected, abs=1e-4)
        state = dict(zip(STATE, outputs, strict=True))
    metadata = {x.key: x.value for x in onnx.load(report["path"]).metadata_props}["latentplan.json"]
    assert json.loads(metadata)["repeat"] == load(run).spec.repeat


def test_pt2_plays_an_episode_as_the_agent_does(run: Path) -> None:
    report = export(run)
    assert report["path"] == str(run / "policy.pt2") and report["largest_difference"] <= 1e-4
    assert 0 < report["milliseconds"]["p50"] <= report["milliseconds"]["p99"]
    files = {"latentplan.json": ""}
    decide = torch.export.load(report["path"], extra_files=files).module()
    metadata = json.loads(files["latentplan.json"])
    assert list(metadata["inputs"]) == ["image", "vector", *STATE, "uniform"]
    assert metadata["inputs"]["image"] == "uint8 1x16x16x3"
    assert metadata["action_low"] == [-1.0] * len(metadata["action_low"]) != []
    state = [torch.from_numpy(x) for x in start(run).values()]
    for obs, expected, uniform in zip(*episode(run), strict=True):
        inputs = [torch.from_numpy(obs[name][None]) for name in ("image", "vector")]
        state = decide(*inputs, *state, torch.from_numpy(uniform))
        assert state[0][0].numpy() == pytest.approx(expected, abs=1e-4)


def test_a_file_that_acts_differently_does_not_replace_the_earlier_one(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "policy.pt2"
    path.write_text("an earlier file")
    monkeypatch.setattr(module, "_open", lambda path: lambda *x: (x[-4] + 1, x[-3], x[-2]))
    with pytest.raises(UserError, match="differs"):
        export(run, path)
    assert path.read_text() == "an earlier file" and list(tmp_path.iterdir()) == [path]


def test_wrong_suffixes_and_missing_packages_are_errors(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert main(["export", str(run), "--out", str(tmp_path / "policy.pth")]) == 2
    assert "must end in .pt2 or .onnx" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert main(["export", str(run), "--out", str(tmp_path / "policy.onnx")]) == 2
    assert "pip install onnx onnxruntime onnxscript" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("file/policy.pt2", "File exists"),
        ("folder.pt2", "Is a directory"),
        ("/proc/policy.pt2", "cannot be written"),
        ("/proc/policy.onnx", "cannot be written"),
    ],
)
def test_a_policy_that_cannot_be_written_is_an_error(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], out: str, message: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.pt2").mkdir()
    path = tmp_path / out  # an absolute path stays as it is
    assert main(["export", str(run), "--out", str(path)]) == 2
    error = capsys.readouterr().err
    assert f"latentplan: {path} cannot be written: " in error and message in error
    assert len(list(tmp_path.iterdir())) == 2
