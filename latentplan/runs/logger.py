"""Metrics as JSON lines and TensorBoard events, with films."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from latentplan.runs import metrics_file
from latentplan.runs.sinks import Sinks
from latentplan.runs.video import encode_gif, encode_png, write_bytes
from latentplan.types import UserError

_EMPTY: Mapping[str, float] = MappingProxyType({})


class Logger:
    """Writes ``metrics.jsonl``, TensorBoard events and ``videos/`` into ``folder``.

    Args:
        folder: the run folder. It is created if it does not exist.
        frame: the environment frame at which the run continues. Rows of later frames were logged
            after the checkpoint. They are removed from ``metrics.jsonl`` and hidden in TensorBoard.
        sinks: also get every row of metrics, and are closed with the logger.

    ``time`` in a row is the wall-clock time of all sessions so far, in seconds. The time between
    sessions does not count.
    """

    def __init__(self, folder: Path, *, frame: int = 0, sinks: Sinks | None = None) -> None:
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / "metrics.jsonl"
        logged_seconds = _drop_later_rows(path, frame) if path.exists() else 0.0
        self._start_time = time.monotonic() - logged_seconds
        self._file = path.open("a", encoding="utf-8")
        self._writer = SummaryWriter(self._folder, purge_step=frame + 1)
        self._sinks = sinks
        self._pending: dict[str, list[Tensor | float]] = {}  # values since the last row, by name

    def add(self, metrics: Mapping[str, Tensor | float]) -> None:
        """Keep scalars for the next :meth:`write`, which logs the mean for each name.

        Tensors are not read before :meth:`write`, so this method never waits for a GPU.
        """
        for name, value in metrics.items():
            scalar = value.detach() if isinstance(value, Tensor) else float(value)
            self._pending.setdefault(name, []).append(scalar)

    def write(self, frame: int, *, now: Mapping[str, float] = _EMPTY) -> dict[str, float]:
        """Log a row at ``frame``: the means of the added scalars, and the values in ``now``.

        Returns:
            The row: ``step`` (environment frames), ``time`` (seconds), and the values by name.

        Raises:
            UserError: the row cannot be written, for example because the disk is full.
        """
        values = {name: _mean(scalars) for name, scalars in self._pending.items()}
        values.update((name, float(value)) for name, value in now.items())
        self._pending.clear()
        seconds = round(time.monotonic() - self._start_time, 3)
        row = {"step": int(frame), "time": seconds, **values}
        # Strict JSON has no NaN. With null the column stays, and every JSON reader accepts it.
        strict = {name: value if math.isfinite(value) else None for name, value in row.items()}
        try:
            self._file.write(json.dumps(strict) + "\n")
            self._file.flush()
            for name, value in values.items():
                self._writer.add_scalar(name, value, frame)
            self._writer.flush()
        except OSError as error:
            raise UserError(f"Metrics cannot be written to {self._folder}: {error}.") from error
        if self._sinks is not None:
            self._sinks.scalars({"time": seconds, **values}, frame)
        return row

    def video(self, tag: str, frames: np.ndarray, frame: int, fps: float = 15) -> Path:
        """Log ``frames`` (T, H, W, 3) uint8 as a GIF. A single frame is logged as a PNG.

        Args:
            tag: the name in TensorBoard.
            frames: the video.
            frame: the environment frame at which the video is logged.
            fps: frames of the video per second.

        Returns:
            The path of the file, ``videos/<tag>-<frame>.gif`` or ``.png``. Slashes in the tag
            become dashes.

        Raises:
            UserError: the file cannot be written.
        """
        kind, encoded = (
            ("png", encode_png(frames[0])) if len(frames) == 1 else ("gif", encode_gif(frames, fps))
        )
        path = self._folder / "videos" / f"{tag.replace('/', '-')}-{frame}.{kind}"
        write_bytes(path, encoded)
        height, width = frames.shape[1:3]
        image = Summary.Image(
            height=height, width=width, colorspace=3, encoded_image_string=encoded
        )
        # SummaryWriter.add_video needs moviepy, and logs nothing with its newer versions.
        summary = Summary(value=[Summary.Value(tag=tag, image=image)])
        self._writer._get_file_writer().add_summary(summary, frame)
        return path

    def points(
        self,
        tag: str,
        features: Tensor,
        columns: Mapping[str, np.ndarray],
        thumbnails: Tensor | None,
        frame: int,
    ) -> None:
        """Log N points for TensorBoard's projector.

        Args:
            tag: the name in TensorBoard.
            features: (N, F) the points.
            columns: arrays (N,) by name. The projector can color the points by them.
            thumbnails: (N, 3, h, w) in [0, 1] images shown at the points, or None.
            frame: the environment frame at which the points are logged.
        """
        rows = [list(map("{:.4g}".format, row)) for row in zip(*columns.values(), strict=True)]
        # If earlier points of this frame stayed, the writer would keep them and log a warning.
        shutil.rmtree(self._folder / f"{frame:05d}" / tag, ignore_errors=True)
        self._writer.add_embedding(
            features,
            rows,
            thumbnails,
            global_step=frame,
            tag=tag,
            metadata_header=list(columns),
        )

    def layout(self, charts: Mapping[str, Mapping[str, Sequence[str]]]) -> None:
        """Set the layout of the custom scalars tab: ``{page: {chart title: tags}}``."""
        self._writer.add_custom_scalars(
            {
                page: {
                    # TensorBoard takes regular expressions. These match one tag each.
                    title: ["Multiline", [f"^{re.escape(tag)}$" for tag in tags]]
                    for title, tags in charts_of_page.items()
                }
                for page, charts_of_page in charts.items()
            }
        )

    def hyperparameters(self, values: Mapping[str, Any], metrics: Sequence[str]) -> None:
        """Log hyperparameters (by name) and the names of result metrics for the HPARAMS tab."""
        # SummaryWriter.add_hparams would write a second run, without the curves.
        for summary in hparams(dict(values), dict.fromkeys(metrics, 0.0)):
            self._writer._get_file_writer().add_summary(summary)

    def text(self, tag: str, text: str, frame: int) -> None:
        """Log ``text`` (Markdown) to TensorBoard."""
        self._writer.add_text(tag, text, frame)

    def close(self) -> None:
        """Write buffered rows and close the files.

        Metrics that were added after the last :meth:`write` are not logged.
        """
        self._writer.close()
        self._file.close()
        if self._sinks is not None:
            self._sinks.close()


def _mean(scalars: list[Tensor | float]) -> float:
    tensors = [value for value in scalars if isinstance(value, Tensor)]
    if len(tensors) == len(scalars):  # needs one transfer from the GPU instead of one per value
        return float(torch.stack(tensors).float().mean())
    return sum(float(value) for value in scalars) / len(scalars)


def _drop_later_rows(path: Path, frame: int) -> float:
    """Remove the rows after ``frame``, and damaged lines, from a ``metrics.jsonl`` file.

    Returns:
        The seconds that the run has taken, including those of the removed rows. If no row is left,
        the run is new and the result is 0.
    """
    rows, lines, _ = metrics_file.read(path)
    kept = [line for row, line in zip(rows, lines, strict=True) if row["step"] <= frame]
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)
    return max((row.get("time") or 0.0 for row in rows), default=0.0) if kept else 0.0
