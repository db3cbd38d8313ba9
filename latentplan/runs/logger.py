"""Metrics as JSON lines and TensorBoard events; videos as GIF summaries and files."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import math
import os
import re
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from latentplan.types import UserError

MAX_GIF_FRAMES = 250  # longer videos are thinned, so that an event file stays small
MAX_PALETTE_PIXELS = 2**18  # finding the palette is slow: about a second per million pixels
_NOTHING: Mapping[str, float] = MappingProxyType({})


class Logger:
    """Writes ``metrics.jsonl``, TensorBoard events and ``videos/`` into ``folder``.

    ``frame`` is where the run goes on: metrics of later frames, logged after the checkpoint that it
    goes on from, are dropped from the file and hidden in TensorBoard. ``time`` in a line is wall
    clock since the first session's start, less the time between sessions.
    """

    def __init__(self, folder: Path, *, frame: int = 0) -> None:
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / "metrics.jsonl"
        earlier = _resume(path, frame) if path.exists() else 0.0
        self._begin = time.monotonic() - earlier
        self._file = path.open("a", encoding="utf-8")
        self._writer = SummaryWriter(self._folder, purge_step=frame + 1)
        self._sums: dict[str, list[Tensor | float]] = {}

    def add(self, metrics: Mapping[str, Tensor | float]) -> None:
        """Keep scalars for the next :meth:`write`, which logs the mean of each name.

        Tensors are not looked at before that, so a GPU is never waited for here.
        """
        for name, value in metrics.items():
            kept = value.detach() if isinstance(value, Tensor) else float(value)
            self._sums.setdefault(name, []).append(kept)

    def write(self, frame: int, *, now: Mapping[str, float] = _NOTHING) -> dict[str, float]:
        """Log the means of what was added and the values of ``now`` at ``frame``; return them.

        Raises:
            UserError: the line cannot be written, for instance because the disk is full.
        """
        values = {name: _mean(kept) for name, kept in self._sums.items()}
        values.update((name, float(value)) for name, value in now.items())
        self._sums.clear()
        row = {"step": int(frame), "time": round(time.monotonic() - self._begin, 3), **values}
        # Strict JSON has no NaN; null keeps the column and every reader.
        safe = {name: value if math.isfinite(value) else None for name, value in row.items()}
        try:
            self._file.write(json.dumps(safe) + "\n")
            self._file.flush()
            for name, value in values.items():
                self._writer.add_scalar(name, value, frame)
            self._writer.flush()
        except OSError as error:
            raise UserError(f"Metrics cannot be written to {self._folder}: {error}.") from error
        return row

    def video(self, tag: str, frames: np.ndarray, frame: int, fps: float = 15) -> Path:
        """Log ``frames`` (T, H, W, 3) uint8 as a GIF, or one frame as a PNG.

        It is kept as ``videos/<tag>-<frame>.gif``, slashes of the tag becoming dashes; the path is
        returned.
        """
        kind, encoded = (
            ("png", encode_png(frames[0])) if len(frames) == 1 else ("gif", encode_gif(frames, fps))
        )
        path = self._folder / "videos" / f"{tag.replace('/', '-')}-{frame}.{kind}"
        _write_bytes(path, encoded)
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
        """Log N points (N, F) for TensorBoard's projector, with columns (N,) to color them by and
        pictures (N, 3, h, w) in [0, 1]."""
        rows = [list(map("{:.4g}".format, row)) for row in zip(*columns.values(), strict=True)]
        # Points logged before for this frame would be kept, with a warning.
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
        """The page of custom scalars: {page: {chart: tags}}."""
        exactly = lambda tag: f"^{re.escape(tag)}$"  # noqa: E731  (TensorBoard takes patterns)
        self._writer.add_custom_scalars(
            {
                page: {
                    title: ["Multiline", list(map(exactly, tags))]
                    for title, tags in of_page.items()
                }
                for page, of_page in charts.items()
            }
        )

    def hyperparameters(self, values: Mapping[str, Any], metrics: Sequence[str]) -> None:
        """What tells this run from others in the HPARAMS tab, and the scalars it is judged by."""
        # SummaryWriter.add_hparams would open another run, without the curves.
        for summary in hparams(dict(values), dict.fromkeys(metrics, 0.0)):
            self._writer._get_file_writer().add_summary(summary)

    def text(self, tag: str, text: str, frame: int) -> None:
        """Log ``text`` (Markdown) to TensorBoard."""
        self._writer.add_text(tag, text, frame)

    def close(self) -> None:
        """Write what is buffered; metrics added since the last :meth:`write` are left out."""
        self._writer.close()
        self._file.close()


def encode_png(picture: np.ndarray) -> bytes:
    """(H, W, 3) uint8 as a PNG."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


def encode_gif(frames: np.ndarray, fps: float) -> bytes:
    """``frames`` (T, H, W, 3) uint8 as an endless GIF with one palette for all frames.

    Above ``MAX_GIF_FRAMES`` frames it is thinned evenly and slowed down to the same duration.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not len(frames):
        raise ValueError(f"want (T, H, W, 3) uint8 frames, got {frames.dtype} {frames.shape}")
    stride = math.ceil(len(frames) / MAX_GIF_FRAMES)
    frames, fps = frames[::stride], fps / stride
    count, height, width, _ = frames.shape
    fewer = frames[:: math.ceil(frames[..., 0].size / MAX_PALETTE_PIXELS)]
    palette = _tall(fewer).quantize(255, Image.Quantize.MEDIANCUT)
    # The free entry of 256 marks pixels that did not change. No dithering: its noise differs from
    # frame to frame and cannot be compressed.
    indexed = _tall(frames).quantize(palette=palette, dither=Image.Dither.NONE)
    images = [indexed.crop((0, t * height, width, (t + 1) * height)) for t in range(count)]
    buffer = io.BytesIO()
    # Viewers slow anything below 20 ms per frame down to 100.
    duration = max(20, round(100 / fps) * 10)
    images[0].save(
        buffer, "GIF", save_all=True, append_images=images[1:], duration=duration, loop=0
    )
    return buffer.getvalue()


def write_video(path: Path, frames: np.ndarray, fps: float) -> Path:
    """Write ``frames`` (T, H, W, 3) uint8 as mp4, or as GIF where there is no ffmpeg.

    Returns the path written, whose suffix tells which. A ``path`` that ends in ``.gif`` is a GIF.

    Raises:
        UserError: neither can be written there.
    """
    path = Path(path)
    if path.suffix != ".gif" and importlib.util.find_spec("imageio_ffmpeg"):
        path = path.with_suffix(".mp4")
        if _write_mp4(path, frames, fps):
            return path
    path = path.with_suffix(".gif")
    _write_bytes(path, encode_gif(frames, fps))
    return path


def _write_mp4(path: Path, frames: np.ndarray, fps: float) -> bool:
    import imageio_ffmpeg  # optional, and slow to import

    # The codec halves the color's resolution, so both sides must be even.
    odd = [(0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)]
    frames = np.ascontiguousarray(np.pad(frames, odd, mode="edge"))
    temporary = path.with_name(f".{path.stem}-new.mp4")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        size = (frames.shape[2], frames.shape[1])
        writer = imageio_ffmpeg.write_frames(str(temporary), size, fps=fps, macro_block_size=2)
        writer.send(None)
        for picture in frames:
            writer.send(picture)
        writer.close()
        if not temporary.stat().st_size:  # close() does not say that ffmpeg failed
            raise OSError("ffmpeg wrote nothing")
        os.replace(temporary, path)
    # No ffmpeg binary for this platform, or one that fails, even to list its encoders.
    except (OSError, RuntimeError, IndexError):
        with contextlib.suppress(OSError):
            temporary.unlink()
        return False
    return True


def _tall(frames: np.ndarray) -> Image.Image:
    """All frames below one another, (T * H, W): one call of Pillow treats them alike."""
    return Image.fromarray(np.ascontiguousarray(frames).reshape(-1, *frames.shape[2:]))


def _write_bytes(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.") from error


def _mean(kept: list[Tensor | float]) -> float:
    tensors = [value for value in kept if isinstance(value, Tensor)]
    if len(tensors) == len(kept):  # on a GPU one transfer, and not one per value
        return float(torch.stack(tensors).float().mean())
    return sum(float(value) for value in kept) / len(kept)


def _resume(path: Path, frame: int) -> float:
    """Drop lines after ``frame`` and a torn last line; return the seconds that were logged.

    The dropped lines' time counts, since it was spent; unless no line is left, which is a new run.
    """
    seconds = 0.0
    kept: list[str] = []
    for row, line in _rows(path):
        seconds = max(seconds, float(row["time"]))
        if row["step"] <= frame:
            kept.append(line)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)
    return seconds if kept else 0.0


def _rows(path: Path) -> Iterable[tuple[dict[str, Any], str]]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            try:
                yield json.loads(line), line.rstrip("\n") + "\n"
            except ValueError:  # cut short by a crash
                continue
