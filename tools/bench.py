#!/usr/bin/env python3
"""Time one update and the environment: ``latentplan bench`` by another name (see its --help)."""

import sys

from latentplan.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
