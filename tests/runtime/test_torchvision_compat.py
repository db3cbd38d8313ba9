"""torchvision's Python code must work with a torch that its compiled extension does not fit."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from latentplan.runtime import torchvision_compat as compat

# Simulates a CPU-only torch on any machine: the dynamic linker refuses the extension.
BROKEN_EXTENSION = """
import torch

def refuse(path):
    raise OSError(f"{path}: undefined symbol")

torch.ops.load_library = refuse
from latentplan.runtime.torchvision_compat import make_grid, v2

assert make_grid(torch.zeros(4, 3, 8, 8), nrow=2, padding=0).shape == (3, 16, 16)
assert v2.functional.resize(torch.zeros(3, 8, 8), [4, 4], antialias=True).shape == (3, 4, 4)
try:
    torch.ops.torchvision.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
except NotImplementedError:
    print("declared without a kernel")
"""


def test_imports_where_the_extension_cannot_load() -> None:
    run = subprocess.run(
        [sys.executable, "-c", BROKEN_EXTENSION], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "declared without a kernel"


def test_nothing_is_declared_where_the_extension_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "_extension_loads", lambda: True)
    assert compat._declare_missing_operators() is None


def test_an_absent_torchvision_is_an_import_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="torchvision is not installed"):
        compat._extension_loads()


def test_resize_gives_squares_and_keeps_flat_colors() -> None:
    colors = np.array([[0, 0, 0], [255, 128, 3], [255, 255, 255]], dtype=np.uint8)
    frames = np.broadcast_to(colors[:, None, None], (3, 48, 100, 3))  # read-only, strided
    resized = compat.resize_frames(frames, 32)
    assert resized.shape == (3, 32, 32, 3)
    assert resized.dtype == np.uint8
    assert resized.flags["C_CONTIGUOUS"]
    assert (resized == colors[:, None, None]).all()


def test_resize_antialiases() -> None:
    frames = np.zeros((1, 256, 256, 3), dtype=np.uint8)
    frames[:, :, ::4] = 255  # every fourth column: point sampling would see all of them or none
    inner = compat.resize_frames(frames, 64)[:, 4:-4, 4:-4].astype(float)
    assert inner.mean() == pytest.approx(255 / 4, abs=2)
    assert inner.std() < 2


def test_resize_does_not_mix_axes() -> None:
    frames = np.zeros((2, 64, 96, 3), dtype=np.uint8)
    frames[1, :32, 48:, 2] = 200  # second frame, upper right quarter, blue
    resized = compat.resize_frames(frames, 16)
    assert resized[1, 3, 12, 2] == 200
    resized[1, :9, 7:, 2] = 0
    assert resized.max() == 0


def test_resize_returns_frames_of_the_right_size_unchanged() -> None:
    frames = np.zeros((2, 64, 64, 3), dtype=np.uint8)
    assert compat.resize_frames(frames, 64) is frames


@pytest.mark.parametrize(
    ("frames", "size"),
    [
        (np.zeros((2, 8, 8, 3), dtype=np.float32), 4),
        (np.zeros((8, 8, 3), dtype=np.uint8), 4),
        (np.zeros((2, 8, 8, 4), dtype=np.uint8), 4),
        (np.zeros((2, 8, 8, 3), dtype=np.uint8), 0),
    ],
)
def test_resize_refuses_arrays_that_are_no_images(frames: np.ndarray, size: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        compat.resize_frames(frames, size)


def test_grid_is_laid_out_in_rows() -> None:
    images = torch.arange(4).view(4, 1, 1, 1).expand(4, 3, 2, 2).float()
    grid = compat.make_grid(images, nrow=2, padding=0)
    assert grid[0].tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]
