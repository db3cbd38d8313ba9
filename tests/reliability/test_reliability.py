"""The trials of ``tools/reliability`` in their quick form: what a fault does to a run.

They run in one program of their own. It forks the runs that it disturbs, and a process that has
trained, as this one has, cannot be forked.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The result of each trial, by its name."""
    folder = tmp_path_factory.mktemp("reliability")
    command = [sys.executable, ROOT / "tools" / "reliability", "quick", "--out", folder]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    found = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    assert found, done.stderr
    return found


def test_a_killed_run_goes_on_bit_for_bit(results: dict[str, dict[str, Any]]) -> None:
    kills = results["kills"]
    assert not kills["wrong_outcomes"]
    assert kills["tried"] == kills["outcomes"]["kills"] > 0


def test_no_damaged_file_is_loaded_silently(results: dict[str, dict[str, Any]]) -> None:
    damage = results["damage"]
    assert not damage["wrong_outcomes"]
    assert damage["outcomes"]["refused"] > 0 and damage["outcomes"]["repaired"] > 0


def test_a_run_survives_an_environment_that_fails_once(results: dict[str, dict[str, Any]]) -> None:
    assert not results["faults"]["wrong_outcomes"]


def test_random_configurations_are_valid_or_refused(results: dict[str, dict[str, Any]]) -> None:
    configs = results["configs"]
    assert not configs["wrong_outcomes"]
    assert configs["outcomes"]["refused"] > 0 and configs["outcomes"]["valid"] > 0


def test_changed_checkpoints_are_refused_or_usable(results: dict[str, dict[str, Any]]) -> None:
    checkpoints = results["checkpoints"]
    assert not checkpoints["wrong_outcomes"]
    assert checkpoints["outcomes"]["refused"] > 0


def test_a_run_keeps_its_handles_and_leaves_no_files(results: dict[str, dict[str, Any]]) -> None:
    # Half a minute is too short for a verdict on growth, since everything grows while a run starts.
    assert not [x for x in results["soak"]["wrong_outcomes"] if " grew by " not in x]
