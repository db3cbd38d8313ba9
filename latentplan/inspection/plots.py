"""Access to matplotlib, which is an optional dependency."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

from latentplan.types import UserError


def pyplot() -> ModuleType:
    """``matplotlib.pyplot``, set up to draw into files. It needs no display.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("The plot needs matplotlib: pip install 'latentplan[plot]'.") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    # A user's own style may have a transparent background, or the colors of a dark screen.
    pyplot.style.use("default")
    return pyplot


def marker(values: Sequence[object]) -> str:
    """The marker of a curve: a single point has no line, and would not be seen without one."""
    return "o" if len(values) == 1 else ""
