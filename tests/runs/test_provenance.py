"""Which commit made a result."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from latentplan.runs import provenance


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that passes for the package's, in a folder of its own."""
    for name in [key for key in os.environ if key.startswith("GIT_")]:  # of a hook, say
        monkeypatch.delenv(name)
    monkeypatch.delenv("LATENTPLAN_COMMIT", raising=False)
    path = tmp_path / "package" / "provenance.py"
    path.parent.mkdir()
    path.touch()
    monkeypatch.setattr(provenance, "__file__", str(path))
    return path


def git(folder: Path, *words: str) -> str:
    own = {"user.name": "a", "user.email": "a@example.org", "commit.gpgsign": "false"}
    settings = [word for key, value in own.items() for word in ("-c", f"{key}={value}")]
    command = ["git", "-C", str(folder), *settings, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_a_commit_and_what_differs_from_it(module: Path) -> None:
    root = module.parent.parent
    git(root, "init", "-q")
    assert provenance.commit() is None  # a repository without one
    git(root, "add", ".")
    git(root, "commit", "-qm", "first")
    made = git(root, "rev-parse", "--short", "HEAD")
    assert provenance.commit() == made
    module.write_text("changed")
    assert provenance.commit() == made + "+"


def test_a_docker_image_names_its_commit_by_a_variable(
    module: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert provenance.commit() is None
    monkeypatch.setenv("LATENTPLAN_COMMIT", "abc1234")
    assert provenance.commit() == "abc1234"
    git(module.parent.parent, "init", "-q")  # a checkout knows better
    assert provenance.commit() is None


def test_the_processor_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    told = "processor\t: 0\nmodel name\t: Some CPU @ 3 GHz\nmodel name\t: Another\n"
    monkeypatch.setattr(Path, "read_text", lambda path: told)
    assert provenance.processor() == "Some CPU @ 3 GHz"
    monkeypatch.setattr(Path, "read_text", lambda path: "nothing\n")
    assert provenance.processor()  # at least its architecture


def test_versions_of_what_is_installed() -> None:
    assert provenance.version("torch") and provenance.version("no-such-package") is None
