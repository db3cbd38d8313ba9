"""Tests of the record of versions, commit and machine."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from latentplan.runs import provenance


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file in a temporary folder that takes the place of the module's own file."""
    for name in [key for key in os.environ if key.startswith("GIT_")]:  # a git hook sets them
        monkeypatch.delenv(name)
    monkeypatch.delenv("LATENTPLAN_COMMIT", raising=False)
    path = tmp_path / "package" / "runs" / "provenance.py"
    path.parent.mkdir(parents=True)
    path.touch()
    monkeypatch.setattr(provenance, "__file__", str(path))
    return path


def git(folder: Path, *arguments: str) -> str:
    """The output of a git command in ``folder``."""
    values = {"user.name": "a", "user.email": "a@example.org", "commit.gpgsign": "false"}
    settings = [x for key, value in values.items() for x in ("-c", f"{key}={value}")]
    command = ["git", "-C", str(folder), *settings, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_the_commit_is_marked_if_files_differ_from_it(module: Path) -> None:
    root = module.parents[2]
    git(root, "init", "-q")
    assert provenance.commit() is None  # the repository has no commit yet
    git(root, "add", ".")
    git(root, "commit", "-qm", "first")
    commit = git(root, "rev-parse", "--short", "HEAD")
    assert provenance.commit() == commit
    module.write_text("changed")
    assert provenance.commit() == commit + "+"


def test_a_docker_image_names_its_commit_by_a_variable(
    module: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert provenance.commit() is None
    monkeypatch.setenv("LATENTPLAN_COMMIT", "abc1234")
    assert provenance.commit() == "abc1234"
    git(module.parents[2], "init", "-q")  # in a checkout, git alone gives the commit
    assert provenance.commit() is None


def test_the_processor_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    cpuinfo = "processor\t: 0\nmodel name\t: Some CPU @ 3 GHz\nmodel name\t: Another\n"
    monkeypatch.setattr(Path, "read_text", lambda path: cpuinfo)
    assert provenance.processor() == "Some CPU @ 3 GHz"
    monkeypatch.setattr(Path, "read_text", lambda path: "nothing\n")
    assert provenance.processor()  # the architecture


def test_only_installed_packages_have_a_version() -> None:
    assert provenance.version("torch") and provenance.version("no-such-package") is None


@pytest.mark.parametrize(
    "program", ["/home/a/.venv/bin/latentplan", "/home/a/latentplan/__main__.py"]
)
def test_the_recorded_command_has_no_folder_of_the_machine(
    monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    monkeypatch.setattr("sys.argv", [program, "train", "task=walker_walk"])
    assert provenance.command() == ["latentplan", "train", "task=walker_walk"]
