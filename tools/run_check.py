"""The command line of the checks in this folder: one run folder in, lines of text out."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from latentplan.types import UserError


def main(name: str, description: str | None, check: Callable[[Path], list[str]]) -> int:
    """Print what ``check`` says of RUN; 0, or 2 after a mistake in what was asked for."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN")
    try:
        print("\n".join(check(parser.parse_args().run)))
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    return 0
