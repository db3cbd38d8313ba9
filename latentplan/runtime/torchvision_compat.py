"""Imports torchvision beside any build of torch. Other modules import torchvision from here.

The published torchvision wheel carries a compiled extension that is linked against CUDA. Beside a
CPU-only torch that extension cannot be loaded. torchvision ignores the failure, and its import then
fails with ``operator torchvision::nms does not exist``: it attaches shape functions to two
operators that only the extension would have declared. Nothing used here needs the extension, so
where it cannot load, the two operator schemas are declared before torchvision is imported.
Calling these operators still fails. Where the extension loads, nothing is changed.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util

import numpy as np
import torch

_SCHEMAS = ("nms", "qnms")
_SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def _extension_loads() -> bool:
    """Whether torchvision's compiled extension can be loaded; it is loaded if it can.

    Raises ImportError when torchvision is not installed. Finding a package does not import it,
    and loading a library a second time (torchvision will) does nothing.
    """
    package = importlib.util.find_spec("torchvision")
    if package is None or not package.submodule_search_locations:
        raise ImportError("torchvision is not installed")
    details = (
        importlib.machinery.ExtensionFileLoader,
        importlib.machinery.EXTENSION_SUFFIXES,
    )
    finder = importlib.machinery.FileFinder(package.submodule_search_locations[0], details)
    extension = finder.find_spec("_C")
    if extension is None or extension.origin is None:
        return False
    try:
        torch.ops.load_library(extension.origin)
    except OSError:  # the dynamic linker refused it
        return False
    return True


def _declare_missing_operators() -> torch.library.Library | None:
    """Declare the operators that the import of torchvision needs, where they are missing.

    Returns the library that owns the declarations (they vanish with it), or None when the
    extension has declared them itself.
    """
    if _extension_loads():
        return None
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in _SCHEMAS:
        if not hasattr(torch.ops.torchvision, name):
            library.define(name + _SIGNATURE)
    return library


_LIBRARY = _declare_missing_operators()

from torchvision.transforms import v2  # noqa: E402  (the operators must be declared first)
from torchvision.utils import make_grid  # noqa: E402

__all__ = ["make_grid", "resize_frames", "v2"]


def resize_frames(frames: np.ndarray, size: int) -> np.ndarray:
    """Resize frames of any shape to squares, with antialiasing.

    Without antialiasing, thin objects (poles, balls) would vanish from some frames and not from
    others. The aspect ratio is not kept, so that every pixel of the source stays visible.

    Args:
        frames: (N, height, width, 3) uint8.
        size: pixels per side of the result.

    Returns:
        (N, size, size, 3) uint8, contiguous; the input itself where it has that size already.

    Raises:
        ValueError: frames are not (N, height, width, 3) uint8, or size is not positive.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(
            f"frames must be (N, height, width, 3) uint8, not {frames.shape} {frames.dtype}"
        )
    if size < 1:
        raise ValueError(f"size must be positive, not {size}")
    if frames.shape[1:3] == (size, size):
        return frames
    owned = np.array(frames, order="C")  # torch refuses read-only and mirrored memory
    images = torch.from_numpy(owned).permute(0, 3, 1, 2)  # (N, 3, h, w)
    resized = v2.functional.resize(images, [size, size], antialias=True)
    return np.ascontiguousarray(resized.permute(0, 2, 3, 1).numpy())
