"""Films: rows of pictures that move together over charts, sequences side by side.

Every frame is laid out like this, here an open loop of three sequences::

                | context 3/5    or    imagined +12       header
    truth       | [ ] [ ] [ ]                             what the environment showed
    model       | [ ] [ ] [ ]                             decoded from the model's state
    error       | [ ] [ ] [ ]                             model - truth, gray where they agree
    reward      | ~~~ ~~~ ~~~                             a chart per sequence over all frames,
    uncertainty | ~~~ ~~~ ~~~                             and a mark at the one that is shown

Borders tell what the model knew: in context frames it saw the truth, in imagined ones only the
actions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from einops import rearrange, repeat
from torch.nn.functional import pad

from latentplan.inspection.canvas import (
    BACKGROUND,
    CONTEXT,
    DIM,
    GAP,
    IMAGINED,
    LINE_HEIGHT,
    TEXT,
    Charts,
    Color,
    Line,
    across,
    as_uint8,
    axis,
    bounds,
    canvas,
    chart,
    difference,
    even,
    framed,
    text,
    width_of,
)
from latentplan.runtime.torchvision_compat import make_grid

HEADER_HEIGHT = LINE_HEIGHT + 3
CHART_HEIGHT = 4 * LINE_HEIGHT + 2
BARE_WIDTH = 240  # of charts where there are no pictures
Header = tuple[str, Color]


def film(
    rows: Mapping[str, np.ndarray],
    headers: Sequence[Header],
    charts: Charts | None = None,
    scale: int = 2,
) -> np.ndarray:
    """Lay out ``rows`` of pictures and ``charts`` under ``headers``.

    Args:
        rows: {label: (B, T, h, w, 3) uint8}, all alike; none where the agent sees no pictures.
        headers: T times what is written above, in the color of the borders.
        charts: {label: lines (B, T)}; all sequences of a chart share its range.
        scale: each pixel is shown as ``scale`` x ``scale`` pixels.

    Returns:
        (T, H, W, 3) uint8, H and W even (video codecs want that).
    """
    charts = charts or {}
    left = label_width(rows, charts)
    colors = np.array([color for _, color in headers])
    parts = []
    if rows:
        tiles = repeat(
            np.stack(list(rows.values())), "r b t h w c -> r b t (h y) (w x) c", y=scale, x=scale
        )
        tiles = framed(tiles, colors)
        parts.append((_grid(tiles), _labels(list(rows), tiles.shape[3] + GAP, left)))
        width = tiles.shape[4]
    else:
        width = BARE_WIDTH
    for title, lines in charts.items():
        parts.append((_chart(lines, width), _chart_label(title, lines, left)))
    height = HEADER_HEIGHT + sum(picture.shape[1] for picture, _ in parts)
    out = canvas(len(headers), even(height), even(left + parts[0][0].shape[2]))
    for t, header in enumerate(headers):
        out[t, :HEADER_HEIGHT, left:] = text([header], out.shape[2] - left, HEADER_HEIGHT)
    top = HEADER_HEIGHT
    for picture, label in parts:
        bottom = top + picture.shape[1]
        out[:, top:bottom, left : left + picture.shape[2]] = picture
        out[:, top:bottom, :left] = label
        top = bottom
    return out


def open_loop_film(
    truth: np.ndarray,
    prediction: np.ndarray,
    headers: Sequence[Header],
    charts: Charts | None = None,
    scale: int = 2,
    names: tuple[str, str] = ("truth", "model"),
) -> np.ndarray:
    """A film of ``prediction`` against ``truth``, and of their difference.

    Args:
        truth: (B, T, H, W, 3) uint8.
        prediction: (B, T, H, W, 3), uint8 or floats in [0, 1] (values beyond are clipped).

    Raises:
        ValueError: the shapes or dtypes are not these.
    """
    model = as_uint8(prediction)
    if truth.dtype != np.uint8 or truth.ndim != 5 or truth.shape[-1] != 3:
        raise ValueError(f"truth must be (B, T, H, W, 3) uint8, not {truth.shape} {truth.dtype}")
    if model.shape != truth.shape:
        raise ValueError(f"prediction {model.shape} and truth {truth.shape} differ in shape")
    rows = {names[0]: truth, names[1]: model, "error": difference(truth, model)}
    return film(rows, headers, charts, scale)


def open_loop_headers(context: int, length: int) -> list[Header]:
    """Of ``length`` frames, of which the model saw the first ``context``."""
    return [
        (f"context {t + 1}/{context}", CONTEXT)
        if t < context
        else (f"imagined +{t + 1 - context}", IMAGINED)
        for t in range(length)
    ]


def label_width(rows: Iterable[str], charts: Charts) -> int:
    """Pixels of the column with the labels of a film."""
    words = [*rows, *charts, *(line.name for lines in charts.values() for line in lines)]
    return max(width_of(x) for x in [*words, *(axis(lines) for lines in charts.values())])


def _grid(tiles: np.ndarray) -> np.ndarray:
    """Lay out tiles (rows, columns, T, h, w, 3) for every t: (T, H, W, 3)."""
    # make_grid takes any number of channels, so time rides along as channels in a single call.
    images = torch.from_numpy(rearrange(tiles, "r b t h w c -> (r b) (t c) h w"))
    if len(images) == 1:  # make_grid returns a single picture without padding
        grid = pad(images[0], [GAP] * 4, value=BACKGROUND[0])
    else:
        grid = make_grid(images, nrow=tiles.shape[1], padding=GAP, pad_value=BACKGROUND[0])
    return rearrange(grid.numpy(), "(t c) h w -> t h w c", c=3)


def _labels(labels: Sequence[str], pitch: int, width: int) -> np.ndarray:
    """The column with the names of the rows, (len(labels) * pitch + GAP, width, 3)."""
    column = canvas(len(labels) * pitch + GAP, width)
    for row, label in enumerate(labels):
        top = GAP + row * pitch
        column[top : top + pitch - GAP] = text([(label, TEXT)], width, pitch - GAP)
    return column


def _chart(lines: Sequence[Line], width: int) -> np.ndarray:
    """Charts of (B, T) lines side by side, with a line where the film is: (T, H, W, 3)."""
    count, length = lines[0].values.shape
    low, high = bounds(lines)
    pitch = width + GAP
    out = canvas(length, CHART_HEIGHT, count * pitch + GAP)
    for b in range(count):
        own = [line._replace(values=line.values[b]) for line in lines]
        left = GAP + b * pitch
        out[:, : CHART_HEIGHT - GAP, left : left + width] = chart(
            own, width, CHART_HEIGHT - GAP, low, high
        )
        for t, x in enumerate(np.rint(across(length, width)).astype(int)):
            out[t, : CHART_HEIGHT - GAP, left + x] = TEXT
    return out


def _chart_label(title: str, lines: Sequence[Line], width: int) -> np.ndarray:
    """Title, the names of the lines in their colors, and the range of the axis."""
    if len(lines) == 1:
        words = [(title, lines[0].color)]
    else:
        words = [(title, TEXT), *((line.name, line.color) for line in lines)]
    return text([*words, (axis(lines), DIM)], width, CHART_HEIGHT)
