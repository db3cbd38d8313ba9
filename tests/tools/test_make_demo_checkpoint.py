"""The tool that builds a small checkpoint to try."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from environments import ROOT
from tiny import run_config

from latentplan.cli.main import main
from latentplan.training.session import train

TOOL = ROOT / "tools" / "make_demo_checkpoint"
SHORT = ("steps=128", "train.prefill=20", "eval.every=64", "eval.episodes=1", "train.length=8")


def test_the_folder_can_be_tried_and_begun_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "demo"
    command = [sys.executable, str(TOOL), "--out", str(out), *SHORT]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert f"latentplan eval {out}" in done.stdout
    assert {path.name for path in out.iterdir()} == {"checkpoint.pt", "config.yaml"}
    assert (out / "checkpoint.pt").stat().st_size < 1e6
    assert main(["eval", str(out), "--episodes", "1"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["task"] == "dummy:pixels" and 0 < result["frames"] <= 128
    before = (out / "checkpoint.pt").read_bytes()
    again = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert again.returncode == 2 and "exists" in again.stderr
    assert (out / "checkpoint.pt").read_bytes() == before
    items = (f"train.init_from={out}", "steps=16", "world.deter=64", "log.inspect_every=0")
    with caplog.at_level(logging.INFO, "latentplan"):
        train(run_config(tmp_path / "run", *items, "eval.every=0"))
    assert "layers begin with the weights of" in caplog.text
