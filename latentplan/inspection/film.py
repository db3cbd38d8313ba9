"""Open-loop films: what happened, what the model saw coming, and where the two differ.

Every frame of a film is laid out like this, sequences side by side::

            | context 3/5    or    imagined +12       header
    truth   | [ ] [ ] [ ]                             what the environment showed
    model   | [ ] [ ] [ ]                             decoded from the model's state
    error   | [ ] [ ] [ ]                             model - truth, gray where they agree

Borders tell what the model knew: in context frames it saw the truth, in imagined ones only the
actions.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from einops import rearrange, repeat
from PIL import Image, ImageDraw, ImageFont

from latentplan.torchvision_compat import make_grid

LABELS = ("truth", "model", "error")
LABEL_WIDTH = 44  # pixels left of the pictures
HEADER_HEIGHT = 16
BORDER = 2  # pixels around each picture
GAP = 2  # pixels between borders
FONT_SIZE = 12

BACKGROUND = (24, 24, 24)
TEXT = (235, 235, 235)
CONTEXT = (60, 180, 75)  # green: the model sees the truth
IMAGINED = (245, 130, 48)  # orange: the model is on its own


def open_loop_film(
    truth: np.ndarray, prediction: np.ndarray, context: int, scale: int = 2
) -> np.ndarray:
    """Lay out a film of ``prediction`` against ``truth``.

    Args:
        truth: (B, T, H, W, 3) uint8.
        prediction: (B, T, H, W, 3), uint8 or floats in [0, 1] (values beyond are clipped):
            reconstructions in the first ``context`` frames, open-loop predictions after that.
        context: frames that the model saw.
        scale: each pixel is shown as ``scale`` x ``scale`` pixels.

    Returns:
        (T, H', W', 3) uint8, H' and W' even (video codecs want that).

    Raises:
        ValueError: the shapes or dtypes are not these.
    """
    model = _as_uint8(prediction)
    if truth.dtype != np.uint8 or truth.ndim != 5 or truth.shape[-1] != 3:
        raise ValueError(f"truth must be (B, T, H, W, 3) uint8, not {truth.shape} {truth.dtype}")
    if model.shape != truth.shape:
        raise ValueError(f"prediction {model.shape} and truth {truth.shape} differ in shape")
    rows = np.stack([truth, model, difference(truth, model)])  # (3, B, T, H, W, 3)
    colors = np.array([CONTEXT if t < context else IMAGINED for t in range(truth.shape[1])])
    tiles = _framed(repeat(rows, "r b t h w c -> r b t (h y) (w x) c", y=scale, x=scale), colors)
    grid = _grid(tiles)
    height, width = grid.shape[1] + HEADER_HEIGHT, grid.shape[2] + LABEL_WIDTH
    even = (len(grid), height + height % 2, width + width % 2, 3)
    film = np.empty(even, np.uint8)
    film[:] = BACKGROUND
    film[:, HEADER_HEIGHT:height, LABEL_WIDTH:width] = grid
    film[:, :, :LABEL_WIDTH] = _labels(even[1], tiles.shape[3] + GAP)
    for t, color in enumerate(colors):
        text = f"context {t + 1}/{context}" if t < context else f"imagined +{t + 1 - context}"
        header = _text(text, even[2] - LABEL_WIDTH, HEADER_HEIGHT, tuple(color))
        film[t, :HEADER_HEIGHT, LABEL_WIDTH:] = header
    return film


def strip(film: np.ndarray, every: int) -> np.ndarray:
    """Every ``every``-th frame of an open-loop ``film`` side by side, labelled once: (H, W, 3)."""
    first, *others = film[::every]
    return np.concatenate([first, *(frame[:, LABEL_WIDTH:] for frame in others)], axis=1)


def difference(truth: np.ndarray, model: np.ndarray) -> np.ndarray:
    """Half of model - truth around mid gray (uint8): brighter where the model is too bright."""
    return ((model.astype(np.int16) - truth + 255) // 2).astype(np.uint8)


def _as_uint8(images: np.ndarray) -> np.ndarray:
    if images.dtype == np.uint8:
        return images
    if not np.issubdtype(images.dtype, np.floating):
        raise ValueError(f"prediction must be uint8 or floats in [0, 1], not {images.dtype}")
    # A NaN must not pass for black unnoticed: white is as far as a picture can go in saying so.
    finite = np.nan_to_num(images.astype(np.float32), nan=1.0)
    return np.rint(np.clip(finite, 0.0, 1.0) * 255.0).astype(np.uint8)


def _framed(pictures: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """Put a border of ``colors[t]`` around pictures ``(..., T, H, W, 3)``."""
    *leading, height, width, channels = pictures.shape
    framed = np.empty((*leading, height + 2 * BORDER, width + 2 * BORDER, channels), np.uint8)
    framed[:] = colors[:, None, None, :]
    framed[..., BORDER:-BORDER, BORDER:-BORDER, :] = pictures
    return framed


def _grid(tiles: np.ndarray) -> np.ndarray:
    """Lay out tiles (rows, columns, T, h, w, 3) for every t: (T, H, W, 3)."""
    # make_grid takes any number of channels, so time rides along as channels in a single call.
    images = torch.from_numpy(rearrange(tiles, "r b t h w c -> (r b) (t c) h w"))
    grid = make_grid(images, nrow=tiles.shape[1], padding=GAP, pad_value=BACKGROUND[0])
    return rearrange(grid.numpy(), "(t c) h w -> t h w c", c=3)


def _labels(height: int, pitch: int) -> np.ndarray:
    """The column with the names of the rows, (height, LABEL_WIDTH, 3)."""
    column = np.empty((height, LABEL_WIDTH, 3), np.uint8)
    column[:] = BACKGROUND
    for row, label in enumerate(LABELS):
        middle = HEADER_HEIGHT + GAP + row * pitch + (pitch - GAP) // 2
        top = max(0, middle - HEADER_HEIGHT // 2)
        place = column[top : top + HEADER_HEIGHT]
        place[:] = _text(label, LABEL_WIDTH, HEADER_HEIGHT, TEXT)[: len(place)]
    return column


def _text(text: str, width: int, height: int, color: tuple[int, ...]) -> np.ndarray:
    """One line of text, centered vertically: (height, width, 3)."""
    image = Image.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(image)
    draw.text((4, height // 2), text, fill=tuple(int(c) for c in color), font=_font(), anchor="lm")
    return np.asarray(image)


@cache
def _font() -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(FONT_SIZE)  # comes with Pillow, so pictures are alike anywhere
