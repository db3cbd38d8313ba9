"""Films: rows of images over charts, with several sequences side by side.

Every frame has this layout, shown here for an open loop of three sequences::

                | context 3/5    or    imagined +12       header
    truth       | [ ] [ ] [ ]                             observations of the environment
    model       | [ ] [ ] [ ]                             decoded from the model's state
    error       | [ ] [ ] [ ]                             model - truth; gray where they agree
    action      | left up left                            names of discrete actions
    reward      | ~~~ ~~~ ~~~                             one chart per sequence over all frames,
    uncertainty | ~~~ ~~~ ~~~                             with a mark at the current frame

The color of the borders shows the input of the model. In context frames it received the true
observations, in imagined frames only the actions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from einops import rearrange, repeat
from torch.nn.functional import pad

from latentplan.inspection.action_names import Texts
from latentplan.inspection.canvas import (
    CONTEXT,
    FAINT,
    GAP,
    IMAGINED,
    Charts,
    Line,
    add_border,
    as_uint8,
    blank_image,
    difference,
    draw_chart,
    range_label,
    round_up_to_even,
    value_range,
    x_positions,
)
from latentplan.runs.stamp import BACKGROUND, LINE_HEIGHT, TEXT, Color, draw_text, text_width
from latentplan.runtime.torchvision_compat import make_grid

HEADER_HEIGHT = LINE_HEIGHT + 3
TEXT_HEIGHT = LINE_HEIGHT + GAP
CHART_HEIGHT = 4 * LINE_HEIGHT + 2
# Pixels of a picture of the scene, and of a chart in a film without images. TensorBoard shrinks
# wider films until their text is illegible.
PICTURE_WIDTH = 128
Header = tuple[str, Color]


def make_film(
    rows: Mapping[str, np.ndarray],
    headers: Sequence[Header],
    charts: Charts | None = None,
    scale: int = 2,
    texts: Texts | None = None,
) -> np.ndarray:
    """Lay out ``rows`` of images, ``texts`` and ``charts`` under ``headers``.

    Args:
        rows: {label: (B, T, h, w, 3) uint8}, all of one shape. Empty if the agent sees no images.
        headers: the T texts above the frames. Their colors are the colors of the borders.
        charts: {title: lines (B, T)}. All sequences of a chart have the same range.
        scale: each pixel is shown as ``scale`` x ``scale`` pixels.
        texts: {label: a text for each of T frames of B sequences}. Long ones are cut.

    Returns:
        (T, H, W, 3) uint8. H and W are even because video codecs need that.
    """
    charts, texts = charts or {}, texts or {}
    left = label_width([*rows, *texts], charts)
    colors = np.array([color for _, color in headers])
    parts = []
    if rows:
        tiles = repeat(
            np.stack(list(rows.values())), "r b t h w c -> r b t (h y) (w x) c", y=scale, x=scale
        )
        tiles = add_border(tiles, colors)
        parts.append((_grid(tiles), _row_labels(list(rows), tiles.shape[3] + GAP, left)))
        width = tiles.shape[4]
    else:
        width = PICTURE_WIDTH
    for text, sequences in texts.items():
        parts.append((_text_strip(sequences, width), draw_text([(text, TEXT)], left, TEXT_HEIGHT)))
    for title, lines in charts.items():
        parts.append((_chart_strip(lines, width), _chart_label(title, lines, left)))
    height = HEADER_HEIGHT + sum(frames.shape[1] for frames, _ in parts)
    out = blank_image(
        len(headers), round_up_to_even(height), round_up_to_even(left + parts[0][0].shape[2])
    )
    for t, header in enumerate(headers):
        out[t, :HEADER_HEIGHT, left:] = draw_text([header], out.shape[2] - left, HEADER_HEIGHT)
    top = HEADER_HEIGHT
    for frames, label in parts:
        bottom = top + frames.shape[1]
        out[:, top:bottom, left : left + frames.shape[2]] = frames
        out[:, top:bottom, :left] = label
        top = bottom
    return out


def make_comparison_film(
    truth: np.ndarray,
    prediction: np.ndarray,
    headers: Sequence[Header],
    charts: Charts | None = None,
    scale: int = 2,
    names: tuple[str, str] = ("truth", "model"),
    texts: Texts | None = None,
) -> np.ndarray:
    """Make a film of true images, predicted images and their difference.

    Args:
        truth: (B, T, h, w, 3) uint8.
        prediction: (B, T, h, w, 3), uint8 or floats in [0, 1]. Other floats are clipped.
        headers, charts, scale, texts: as in :func:`make_film`.
        names: the labels of ``truth`` and ``prediction``.

    Returns:
        (T, H, W, 3) uint8, as :func:`make_film`.

    Raises:
        ValueError: an array has another shape or dtype.
    """
    model = as_uint8(prediction)
    if truth.dtype != np.uint8 or truth.ndim != 5 or truth.shape[-1] != 3:
        raise ValueError(f"truth must be (B, T, H, W, 3) uint8, not {truth.shape} {truth.dtype}")
    if model.shape != truth.shape:
        raise ValueError(f"prediction {model.shape} and truth {truth.shape} differ in shape")
    rows = {names[0]: truth, names[1]: model, "error": difference(truth, model)}
    return make_film(rows, headers, charts, scale, texts)


def open_loop_headers(context: int, length: int) -> list[Header]:
    """Headers of ``length`` frames. The model receives observations in the first ``context``."""
    return [
        (f"context {t + 1}/{context}", CONTEXT)
        if t < context
        else (f"imagined +{t + 1 - context}", IMAGINED)
        for t in range(length)
    ]


def label_width(rows: Iterable[str], charts: Charts) -> int:
    """The width in pixels of the column of labels, for labels of rows and the charts of a film."""
    labels = [*rows, *charts, *(line.name for lines in charts.values() for line in lines)]
    return max(text_width(x) for x in [*labels, *(range_label(lines) for lines in charts.values())])


def _grid(tiles: np.ndarray) -> np.ndarray:
    """Lay out tiles (rows, columns, T, h, w, 3) in every frame: (T, H, W, 3)."""
    # make_grid accepts any number of channels. With time as channels, one call is enough.
    images = torch.from_numpy(rearrange(tiles, "r b t h w c -> (r b) (t c) h w"))
    if len(images) == 1:  # make_grid returns a single image without padding
        grid = pad(images[0], [GAP] * 4, value=BACKGROUND[0])
    else:
        grid = make_grid(images, nrow=tiles.shape[1], padding=GAP, pad_value=BACKGROUND[0])
    return rearrange(grid.numpy(), "(t c) h w -> t h w c", c=3)


def _row_labels(labels: Sequence[str], pitch: int, width: int) -> np.ndarray:
    """The column with the names of the rows, (len(labels) * pitch + GAP, width, 3)."""
    column = blank_image(len(labels) * pitch + GAP, width)
    for row, label in enumerate(labels):
        top = GAP + row * pitch
        column[top : top + pitch - GAP] = draw_text([(label, TEXT)], width, pitch - GAP)
    return column


def _text_strip(texts: Sequence[Sequence[str]], width: int) -> np.ndarray:
    """The texts (B, T) of sequences side by side: (T, H, W, 3)."""
    out = blank_image(len(texts[0]), TEXT_HEIGHT, len(texts) * (width + GAP) + GAP)
    for b, sequence in enumerate(texts):
        left = GAP + b * (width + GAP)
        for t, text in enumerate(sequence):
            out[t, :, left : left + width] = draw_text([(text, TEXT)], width, TEXT_HEIGHT)
    return out


def _chart_strip(lines: Sequence[Line], width: int) -> np.ndarray:
    """Charts of (B, T) lines side by side, with a mark at the current frame: (T, H, W, 3)."""
    count, length = lines[0].values.shape
    low, high = value_range(lines)
    pitch = width + GAP
    out = blank_image(length, CHART_HEIGHT, count * pitch + GAP)
    for b in range(count):
        lines_of_sequence = [line._replace(values=line.values[b]) for line in lines]
        left = GAP + b * pitch
        out[:, : CHART_HEIGHT - GAP, left : left + width] = draw_chart(
            lines_of_sequence, width, CHART_HEIGHT - GAP, low, high
        )
        for t, x in enumerate(np.rint(x_positions(length, width)).astype(int)):
            out[t, : CHART_HEIGHT - GAP, left + x] = TEXT
    return out


def _chart_label(title: str, lines: Sequence[Line], width: int) -> np.ndarray:
    """The title, the names of the lines in their colors, and the range of the axis."""
    if len(lines) == 1:
        labels = [(title, lines[0].color)]
    else:
        labels = [(title, TEXT), *((line.name, line.color) for line in lines)]
    return draw_text([*labels, (range_label(lines), FAINT)], width, CHART_HEIGHT)
