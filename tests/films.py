"""A film for tests, and the frames of a GIF."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image


def moving_film(count: int, height: int = 12, width: int = 10) -> np.ndarray:
    """A moving block of changing color. It has few colors, and no two frames are equal."""
    film = np.zeros((count, height, width, 3), np.uint8)
    for t in range(count):
        left = t % (width - 3)
        film[t, 2:6, left : left + 3] = (40 + t % 50, 200 - t % 50, (t * 7) % 250)
    return film


def decode_gif(gif: bytes) -> tuple[np.ndarray, list[int]]:
    """The frames (T, H, W, 3) of a GIF, and how long each is shown, in milliseconds."""
    image = Image.open(io.BytesIO(gif))
    frames, durations = [], []
    for t in range(image.n_frames):
        image.seek(t)
        frames.append(np.asarray(image.convert("RGB")))
        durations.append(image.info["duration"])
    assert image.info["loop"] == 0
    return np.stack(frames), durations
