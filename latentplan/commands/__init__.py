"""The commands: what each takes, and what it runs."""

from __future__ import annotations

from latentplan.commands import machine, runs
from latentplan.commands.arguments import Commands


def add_commands(commands: Commands) -> None:
    """All of them, of argparse's subparsers."""
    runs.add(commands)
    machine.add(commands)
