"""Explanations of the configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

from latentplan.cli.main import main
from latentplan.config.reference import KINDS, explain, listing, markdown
from latentplan.config.validation import schema_fields
from latentplan.types import UserError

ROOT = Path(__file__).parents[2]


def test_a_key_is_explained_with_its_bounds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--explain", "world.members", "mpdp"]) == 0
    text = capsys.readouterr().out
    assert "Number M of ensemble members" in text and "default 5; at least 1" in text
    assert "mpdp.policies" in text and "one of per_step, shared" in text
    assert "behavior.lam" not in text


def test_all_keys_are_explained_without_names() -> None:
    text = explain([])
    assert all(f"{key}\n" in text for key, _ in schema_fields())


def test_an_unknown_key_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"world\.members"):
        explain(["world.memberss"])
    with pytest.raises(UserError, match=r"env\.num_envs"):
        explain(["env.count"])


def test_the_page_of_all_keys_is_up_to_date() -> None:
    """tools/configuration_reference writes it."""
    assert (ROOT / "docs" / "configuration.md").read_text() == markdown()


def test_every_preset_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    text = capsys.readouterr().out
    for folder in KINDS.values():
        if folder != "task":
            assert all(f"  {x.stem} " in text for x in (ROOT / "configs" / folder).glob("*.yaml"))
    assert "walker_walk" in text and "gym:ID" in text
    assert "\n  tiny  The smallest agent that still learns.\n" in text  # the first sentence
    (question,) = (x for x in text.splitlines() if x.startswith("  planner_state "))
    assert question.endswith("help from state vectors?")
    assert main(["list", "sizes"]) == 0
    assert capsys.readouterr().out.strip() == listing("sizes")
    assert main(["list", "nothing"]) == 2
