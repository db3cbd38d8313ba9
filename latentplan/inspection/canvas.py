"""Drawing functions of films and stills: colors, text, borders and charts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from latentplan.runs.stamp import BACKGROUND, Color

BORDER = 2  # pixels of the border around each image
GAP = 2  # pixels between borders
DIM: Color = (110, 110, 110)  # of lines and borders; too dark for text
FAINT: Color = (170, 170, 170)  # of text that is less important
CONTEXT: Color = (60, 180, 75)  # green: the model receives the true observation
IMAGINED: Color = (245, 130, 48)  # orange: the model receives actions only
CHOSEN: Color = (255, 225, 25)  # yellow: the candidate that the planner chose
SECOND: Color = (70, 160, 245)  # blue: the second of two imagined rollouts
UNCERTAIN: Color = (240, 90, 200)  # pink: the disagreement of the ensemble


class Line(NamedTuple):
    """A curve of a chart."""

    name: str
    values: np.ndarray  # (..., T) floats; NaN at steps without a value
    color: Color
    included: tuple[float, ...] = ()  # values that the axis shows in addition to the curve


Charts = Mapping[str, Sequence[Line]]  # the lines of each chart, by title


def value_range(lines: Sequence[Line]) -> tuple[float, float]:
    """The smallest and the largest value of ``lines``. The two always differ."""
    values = np.concatenate([[*line.included, *np.ravel(line.values)] for line in lines])
    values = values[np.isfinite(values)]
    if not len(values):
        return 0.0, 1.0
    low, high = float(values.min()), float(values.max())
    return (low, high) if high > low else (low - 0.5, high + 0.5)


# Measured: matplotlib 3.11 (Agg) needs 3.3 times the CPU time of this code for the chart strip of a
# film (39 against 12 ms: 64 frames, 2 sequences, 2 curves, median of 60, one core), and 25 times
# that time for a still (35 against 1.4 ms). It also is an optional dependency.
def draw_chart(
    lines: Sequence[Line], width: int, height: int, low: float, high: float
) -> np.ndarray:
    """Draw curves (T,) over the whole width of a chart.

    Args:
        lines: the curves. A NaN interrupts a curve.
        width, height: pixels of the chart.
        low, high: the values at the bottom and at the top.

    Returns:
        (height, width, 3) uint8.
    """
    image = Image.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, width - 1, height - 1), outline=DIM)
    if low < 0 < high:
        zero = _y_positions(np.zeros(1), height, low, high)[0]
        draw.line((0, zero, width, zero), fill=DIM)
    for line in lines:
        x = x_positions(len(line.values), width)
        y = _y_positions(np.asarray(line.values, float), height, low, high)
        for piece in np.ma.clump_unmasked(np.ma.masked_invalid(y)):
            points = list(zip(x[piece].tolist(), y[piece].tolist(), strict=True))
            if len(points) == 1:
                (a, b), r = points[0], 1
                draw.ellipse((a - r, b - r, a + r, b + r), fill=line.color)
            else:
                draw.line(points, fill=line.color, width=2)
    return np.asarray(image)


def x_positions(count: int, width: int) -> np.ndarray:
    """The horizontal pixel positions (count,) of ``count`` points in a chart."""
    return np.linspace(3, width - 4, count)


def _y_positions(values: np.ndarray, height: int, low: float, high: float) -> np.ndarray:
    """The vertical pixel positions of values, of the same shape."""
    return 3 + (height - 7) * (high - values) / (high - low)


def add_border(images: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """Add a border to images (..., h, w, 3) uint8, in ``colors`` (..., 3)."""
    *leading, height, width, channels = images.shape
    out = np.empty((*leading, height + 2 * BORDER, width + 2 * BORDER, channels), np.uint8)
    out[:] = np.asarray(colors)[..., None, None, :]
    out[..., BORDER:-BORDER, BORDER:-BORDER, :] = images
    return out


def blank_image(*shape: int) -> np.ndarray:
    """An array (*shape, 3) uint8 in the background color."""
    out = np.empty((*shape, 3), np.uint8)
    out[:] = BACKGROUND
    return out


def round_up_to_even(size: int) -> int:
    """The next even number, because video codecs need even heights and widths."""
    return size + size % 2


def as_uint8(images: np.ndarray) -> np.ndarray:
    """Convert images to uint8.

    Args:
        images: floats in [0, 1], or uint8, which is returned unchanged. Other floats are clipped.

    Raises:
        ValueError: the images have another dtype.
    """
    if images.dtype == np.uint8:
        return images
    if not np.issubdtype(images.dtype, np.floating):
        raise ValueError(f"images must be uint8 or floats in [0, 1], not {images.dtype}")
    # A NaN becomes white, because a black pixel would not be noticed.
    finite = np.nan_to_num(images.astype(np.float32), nan=1.0)
    return np.rint(np.clip(finite, 0.0, 1.0) * 255.0).astype(np.uint8)


def difference(truth: np.ndarray, model: np.ndarray) -> np.ndarray:
    """Half of model - truth around mid gray (uint8). It is bright where the model is too bright."""
    return ((model.astype(np.int16) - truth + 255) // 2).astype(np.uint8)


def format_number(value: float) -> str:
    """Format a number with three significant digits, or two if it is small: 1.2e-3."""
    if value and abs(value) < 0.01:
        digits, power = f"{value:.1e}".split("e")
        return f"{digits}e{int(power)}"
    return f"{value:.3g}"


def range_label(lines: Sequence[Line]) -> str:
    """The label that shows the range of a chart, such as ``0 to 1``."""
    low, high = value_range(lines)
    return f"{format_number(low)} to {format_number(high)}"
