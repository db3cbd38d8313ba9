"""Commands about recorded data. They import modules when they run."""

from __future__ import annotations

import argparse
from pathlib import Path

from latentplan.cli.arguments import Commands, expanded, path


def add(commands: Commands) -> None:
    """Add the commands. Each sets ``run``, a function from parsed arguments to the exit code."""
    parser = commands.add_parser(
        "import", help="turn recorded episodes into a folder for train.offline"
    )
    parser.add_argument(
        "kind",
        choices=("minari", "npz"),
        help="a Minari data set, or a folder with one npz file per episode",
    )
    parser.add_argument(
        "source",
        type=expanded,
        metavar="SOURCE",
        help="a folder, or the identifier of a Minari data set on this machine",
    )
    parser.add_argument(
        "--out", type=path, required=True, metavar="FOLDER", help="the folder that is written"
    )
    parser.set_defaults(run=_import)


def _import(args: argparse.Namespace) -> int:
    import json

    from latentplan.datasets.episodes import write
    from latentplan.datasets.minari_episodes import MinariEpisodes
    from latentplan.datasets.npz_episodes import NpzEpisodes

    episodes = (
        MinariEpisodes(args.source) if args.kind == "minari" else NpzEpisodes(Path(args.source))
    )
    print(json.dumps(write(episodes, args.out), indent=1))
    return 0
