"""``python -m latentplan``: the command line."""

import sys

from latentplan.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
