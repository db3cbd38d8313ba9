"""The command line of the checks in this folder. It maps a run folder to lines of text."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from latentplan.types import UserError


def main(name: str, description: str | None, check: Callable[[Path], list[str]]) -> int:
    """Print the lines that ``check`` returns for RUN.

    Returns:
        The exit code: 0 for success, 2 for an error of the user.
    """
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
