"""Put the folder of the benchmarks, which are scripts, on the import path."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "benchmarks"))
