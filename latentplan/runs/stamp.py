"""Text in pictures, and the line on every film that says of which run and frame it is."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

LINE_HEIGHT = 15  # pixels of a line of text
FONT_SIZE = 12

Color = tuple[int, int, int]
BACKGROUND: Color = (24, 24, 24)
TEXT: Color = (235, 235, 235)


def stamp(frames: np.ndarray, run: str, frame: int, *more: str) -> np.ndarray:
    """Write the run and its frames of training above a film (T, H, W, 3) uint8.

    Args:
        frames: the film.
        run: the name of the run.
        frame: environment frames of training.
        more: further parts of the line, such as the name of a policy.

    Returns:
        (T, H', W', 3) uint8, W' >= W. Parts that do not fit beside each other have a line each.
    """
    parts = [run, f"frame {frame:,}", *more]
    line = "   ".join(parts)
    lines = [line] if text_width(line) <= frames.shape[2] else parts
    width = max(frames.shape[2], *map(text_width, lines))
    title = draw_text([(x, TEXT) for x in lines], width, LINE_HEIGHT * len(lines) + 3)
    film = np.pad(frames, ((0, 0), (0, 0), (0, width - frames.shape[2]), (0, 0)))
    film[:, :, frames.shape[2] :] = BACKGROUND
    return np.concatenate([np.broadcast_to(title, (len(film), *title.shape)), film], 1)


def draw_text(
    lines: Sequence[tuple[str, Color]], width: int, height: int, background: Color = BACKGROUND
) -> np.ndarray:
    """Draw lines of text, flush left and centered vertically: (height, width, 3) uint8."""
    image = Image.new("RGB", (width, height), background)
    draw = ImageDraw.Draw(image)
    top = (height - LINE_HEIGHT * len(lines)) / 2
    for i, (line, color) in enumerate(lines):
        position = (4, top + LINE_HEIGHT * (i + 0.5))
        draw.text(position, line, fill=tuple(int(c) for c in color), font=_font(), anchor="lm")
    return np.asarray(image)


def text_width(line: str) -> int:
    """The width in pixels of one line of text, with its margins."""
    return int(np.ceil(_font().getlength(line))) + 8


@cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    # This font is part of Pillow, so that films look the same on every machine.
    return ImageFont.load_default(FONT_SIZE)
