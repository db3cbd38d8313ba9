"""What films and stills are painted with: colors, text, bordered pictures, charts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

BORDER = 2  # pixels around each picture
GAP = 2  # pixels between borders
LINE_HEIGHT = 15
FONT_SIZE = 12

Color = tuple[int, int, int]
BACKGROUND: Color = (24, 24, 24)
TEXT: Color = (235, 235, 235)
DIM: Color = (110, 110, 110)
CONTEXT: Color = (60, 180, 75)  # green: the model sees the truth
IMAGINED: Color = (245, 130, 48)  # orange: the model is on its own
CHOSEN: Color = (255, 225, 25)  # yellow: what the planner took
SECOND: Color = (70, 160, 245)  # blue: another imagination beside the first
UNCERTAIN: Color = (240, 90, 200)  # pink: disagreement of the ensemble


class Line(NamedTuple):
    """A curve of a chart."""

    name: str
    values: np.ndarray  # (..., T) floats; nan where there is nothing to show
    color: Color
    within: tuple[float, ...] = ()  # values that the axis must show, whatever the curve does


def bounds(lines: Sequence[Line]) -> tuple[float, float]:
    """The range that shows all of ``lines``; never empty."""
    values = np.concatenate([[*line.within, *np.ravel(line.values)] for line in lines])
    values = values[np.isfinite(values)]
    if not len(values):
        return 0.0, 1.0
    low, high = float(values.min()), float(values.max())
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def chart(lines: Sequence[Line], width: int, height: int, low: float, high: float) -> np.ndarray:
    """Curves (T,) over the whole width, ``low`` at the bottom: (height, width, 3) uint8."""
    image = Image.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, width - 1, height - 1), outline=DIM)
    if low < 0 < high:
        zero = _down(np.zeros(1), height, low, high)[0]
        draw.line((0, zero, width, zero), fill=DIM)
    for line in lines:
        x = across(len(line.values), width)
        y = _down(np.asarray(line.values, float), height, low, high)
        for piece in np.ma.clump_unmasked(np.ma.masked_invalid(y)):
            points = list(zip(x[piece].tolist(), y[piece].tolist(), strict=True))
            if len(points) == 1:
                (a, b), r = points[0], 1
                draw.ellipse((a - r, b - r, a + r, b + r), fill=line.color)
            else:
                draw.line(points, fill=line.color, width=2)
    return np.asarray(image)


def across(count: int, width: int) -> np.ndarray:
    """The columns of ``count`` points in a chart."""
    return np.linspace(3, width - 4, count)


def _down(values: np.ndarray, height: int, low: float, high: float) -> np.ndarray:
    return 3 + (height - 7) * (high - values) / (high - low)


def framed(pictures: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """A border around pictures (..., h, w, 3), in ``colors`` (..., 3)."""
    *leading, height, width, channels = pictures.shape
    out = np.empty((*leading, height + 2 * BORDER, width + 2 * BORDER, channels), np.uint8)
    out[:] = np.asarray(colors)[..., None, None, :]
    out[..., BORDER:-BORDER, BORDER:-BORDER, :] = pictures
    return out


def text(
    lines: Sequence[tuple[str, Color]], width: int, height: int, background: Color = BACKGROUND
) -> np.ndarray:
    """Lines of text, centered vertically, flush left: (height, width, 3) uint8."""
    image = Image.new("RGB", (width, height), background)
    draw = ImageDraw.Draw(image)
    top = (height - LINE_HEIGHT * len(lines)) / 2
    for i, (words, color) in enumerate(lines):
        at = (4, top + LINE_HEIGHT * (i + 0.5))
        draw.text(at, words, fill=tuple(int(c) for c in color), font=_font(), anchor="lm")
    return np.asarray(image)


def width_of(words: str) -> int:
    """Pixels that one line of text needs."""
    return int(np.ceil(_font().getlength(words))) + 8


@cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(FONT_SIZE)  # comes with Pillow, so pictures are alike anywhere


def canvas(*shape: int) -> np.ndarray:
    """Nothing painted yet: (*shape, 3) uint8."""
    out = np.empty((*shape, 3), np.uint8)
    out[:] = BACKGROUND
    return out


def even(size: int) -> int:
    """``size`` or one more: video codecs want sides to be even."""
    return size + size % 2


def as_uint8(images: np.ndarray) -> np.ndarray:
    """Pictures in [0, 1] (clipped) or bytes, as bytes.

    Raises:
        ValueError: they are something else.
    """
    if images.dtype == np.uint8:
        return images
    if not np.issubdtype(images.dtype, np.floating):
        raise ValueError(f"pictures must be uint8 or floats in [0, 1], not {images.dtype}")
    # A NaN must not pass for black unnoticed: white is as far as a picture can go in saying so.
    finite = np.nan_to_num(images.astype(np.float32), nan=1.0)
    return np.rint(np.clip(finite, 0.0, 1.0) * 255.0).astype(np.uint8)


def difference(truth: np.ndarray, model: np.ndarray) -> np.ndarray:
    """Half of model - truth around mid gray (uint8): brighter where the model is too bright."""
    return ((model.astype(np.int16) - truth + 255) // 2).astype(np.uint8)


def number(value: float) -> str:
    """Three significant digits, short: 0.00123 is 1.2e-3."""
    if value and abs(value) < 0.01:
        digits, power = f"{value:.1e}".split("e")
        return f"{digits}e{int(power)}"
    return f"{value:.3g}"


def axis(lines: Sequence[Line]) -> str:
    """The range of a chart, in words."""
    low, high = bounds(lines)
    return f"{number(low)} to {number(high)}"


Charts = Mapping[str, Sequence[Line]]  # by title
