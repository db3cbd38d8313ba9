"""``python -m latentplan``: the command line."""

import sys

from latentplan.cli.main import main

sys.exit(main())
