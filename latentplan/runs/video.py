"""Images and films as files: PNG, GIF and MP4."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from latentplan.types import UserError

MAX_GIF_FRAMES = 250  # frames of longer videos are skipped, so that an event file stays small
MAX_GIF_RATE, MAX_MP4_RATE = 50, 60  # frames per second that viewers show
MAX_PALETTE_PIXELS = 2**18  # computing the palette takes about a second per million pixels
SUFFIXES = (".mp4", ".gif")


def encode_png(image: np.ndarray) -> bytes:
    """Encode an image (H, W, 3) uint8 as a PNG."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def encode_gif(frames: np.ndarray, fps: float) -> bytes:
    """Encode ``frames`` (T, H, W, 3) uint8 as an endless GIF with one palette for all frames.

    If there are more than ``MAX_GIF_FRAMES`` frames, or more than ``MAX_GIF_RATE`` per second, only
    every n-th is kept and is shown n times as long. The duration of the video stays the same.

    Raises:
        ValueError: ``frames`` has another shape or dtype, or is empty.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not len(frames):
        raise ValueError(f"want (T, H, W, 3) uint8 frames, got {frames.dtype} {frames.shape}")
    stride = math.ceil(max(len(frames) / MAX_GIF_FRAMES, fps / MAX_GIF_RATE))
    frames, fps = frames[::stride], fps / stride
    count, height, width, _ = frames.shape
    sample = frames[:: math.ceil(frames[..., 0].size / MAX_PALETTE_PIXELS)]
    palette = _stack_vertically(sample).quantize(255, Image.Quantize.MEDIANCUT)
    # The 256th entry of the palette marks pixels that did not change. Dithering is off because its
    # noise differs from frame to frame, so that it cannot be compressed.
    indexed = _stack_vertically(frames).quantize(palette=palette, dither=Image.Dither.NONE)
    images = [indexed.crop((0, t * height, width, (t + 1) * height)) for t in range(count)]
    buffer = io.BytesIO()
    # Viewers show frames of less than 20 ms for 100 ms.
    duration = max(20, round(100 / fps) * 10)
    images[0].save(
        buffer, "GIF", save_all=True, append_images=images[1:], duration=duration, loop=0
    )
    return buffer.getvalue()


def write_video(path: Path, frames: Sequence[np.ndarray] | np.ndarray, fps: float) -> Path:
    """Write T ``frames`` (H, W, 3) uint8 as an mp4 file or a GIF.

    A GIF is written if ``path`` ends in ``.gif``, or if ffmpeg is missing or fails. Frames beyond
    what viewers show in a second are left out, and the duration stays the same.

    Returns:
        The path that was written: ``path`` with the suffix ``.mp4`` or ``.gif`` in the place of
        one of the two, else behind the whole name.

    Raises:
        UserError: neither file can be written there.
    """
    path = Path(path)
    if path.suffix.lower() != ".gif" and importlib.util.find_spec("imageio_ffmpeg"):
        stride = math.ceil(fps / MAX_MP4_RATE)
        if _write_mp4(_with_suffix(path, ".mp4"), frames[::stride], fps / stride):
            return _with_suffix(path, ".mp4")
    path = _with_suffix(path, ".gif")
    write_bytes(path, encode_gif(np.asarray(frames), fps))
    return path


def tagged(path: Path, tag: str) -> Path:
    """``path`` with ``tag`` at the end of its name, before the suffix of a video."""
    stem, suffix = _split(path)
    return path.with_name(f"{stem}-{tag}{suffix}")


def _with_suffix(path: Path, suffix: str) -> Path:
    stem, typed = _split(path)
    return path if typed.lower() == suffix else path.with_name(stem + suffix)


def _split(path: Path) -> tuple[str, str]:
    """The name of a path and the suffix of a video, which is empty where there is none.

    A name may have other dots, as in ``walker.seed1``.
    """
    suffix = path.suffix if path.suffix.lower() in SUFFIXES else ""
    return path.name.removesuffix(suffix), suffix


def _write_mp4(path: Path, frames: Sequence[np.ndarray] | np.ndarray, fps: float) -> bool:
    """Write an mp4 file with ffmpeg. If that fails, return False and leave ``path`` as it was."""
    import imageio_ffmpeg  # optional, and slow to import

    # The codec halves the resolution of colors, so height and width must be even.
    height, width = frames[0].shape[:2]
    padding = [(0, height % 2), (0, width % 2), (0, 0)]
    temporary = path.with_name(f".{path.stem}-new.mp4")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        size = (width + width % 2, height + height % 2)
        writer = imageio_ffmpeg.write_frames(str(temporary), size, fps=fps, macro_block_size=2)
        writer.send(None)
        for image in frames:
            writer.send(np.ascontiguousarray(np.pad(image, padding, mode="edge")))
        writer.close()
        if not temporary.stat().st_size:  # close() raises no error if ffmpeg failed
            raise OSError("ffmpeg wrote nothing")
        os.replace(temporary, path)
    # There is no ffmpeg binary for this platform, or it fails. It may fail to list its encoders.
    except (OSError, RuntimeError, IndexError):
        with contextlib.suppress(OSError):
            temporary.unlink()
        return False
    return True


def _stack_vertically(frames: np.ndarray) -> Image.Image:
    """One image (T * H, W) of all frames, so that a single call of Pillow quantizes all frames."""
    return Image.fromarray(np.ascontiguousarray(frames).reshape(-1, *frames.shape[2:]))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file, and create its folder.

    Raises:
        UserError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.") from error
