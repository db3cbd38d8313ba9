"""Charts of the entries of state vectors: predicted against true values."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from latentplan.inspection.canvas import IMAGINED, Charts, Line
from latentplan.nn.distributions import symexp, symlog
from latentplan.runs.stamp import TEXT

MOST_ENTRIES = 4  # that a film shows, those that vary most


def entry_charts(
    truth: np.ndarray, model: Tensor, name: str, labels: tuple[str, str] = ("true", "model")
) -> Charts:
    """Charts of the entries of a vector that vary most in the truth, in the order of their indices.

    Args:
        truth: (B, T, dim) in the units of the environment.
        model: (B, T, dim) in symlog units, as the world model decodes vectors.
        name: of the vector; the titles are ``name[index]``.
        labels: the names of the two lines of a chart.
    """
    predicted = symexp(model.float().cpu()).numpy()
    # In symlog units a fast joint does not hide a slow one.
    spread = symlog(torch.as_tensor(truth)).std(1).mean(0)
    chosen = sorted(spread.argsort(descending=True)[:MOST_ENTRIES].tolist())
    return {
        f"{name}[{k}]": [
            Line(labels[0], truth[..., k], TEXT),
            Line(labels[1], predicted[..., k], IMAGINED),
        ]
        for k in chosen
    }


def end_chart(
    is_terminal: np.ndarray, cont: np.ndarray, labels: tuple[str, str] = ("true", "model")
) -> list[Line]:
    """Whether the episode went on, and the predicted probability of that.

    Args:
        is_terminal: (B, T) bool.
        cont: (B, T).
        labels: the names of the two lines.
    """
    went_on = (~np.asarray(is_terminal, bool)).astype(float)
    return [
        Line(labels[0], went_on, TEXT, (0.0, 1.0)),
        Line(labels[1], cont, IMAGINED, (0.0, 1.0)),
    ]
