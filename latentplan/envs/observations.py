"""How the observations of a Gymnasium space become an image and a vector.

`entries_of` decides it once, from the space. `read` then converts every observation, in the
environment and in a loaded agent alike.

- An image is a Box of bytes (0 to 255) or of shares (0 to 1), gray or in colors, with its channels
  first or last. Of a stack of frames the newest one is used, because the world model remembers.
  Several images are put side by side.
- Other numbers of any shape and type form the vector, in the order of their names. A choice among
  a few values is one-hot.
- Texts are left out.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from gymnasium import spaces

from latentplan.types import Entry, UserError

log = logging.getLogger("latentplan")
SMALLEST_SIDE = 8  # pixels; a smaller array is taken for numbers
MOST_CLASSES = 4096  # of a one-hot choice; a choice among more is used as a number
NUMBERS, ONE_HOT, UNUSED = "numbers", "one_hot", "unused"
# The axes of images, in which n counts the frames of a stack, and c the colors.
IMAGE_AXES = ("hw", "hwc", "chw", "nhw", "nhwc", "nchw")
_WRAP = (
    "use gymnasium.wrappers.FilterObservation to leave it out, or TransformObservation to change it"
)


class ObservationError(ValueError):
    """An observation that is not of its space. The message continues "... returned"."""


# --- from the space, once -------------------------------------------------------------------


def entries_of(space: spaces.Space, obs: str) -> tuple[Entry, ...]:
    """The entries of an environment's observations that an agent uses.

    Args:
        space: the environment's observation space.
        obs: ``pixels``, ``state`` or ``both``.

    Returns:
        Images only, numbers only, or both. There may be no image: then the environment is drawn.

    Raises:
        UserError: the agent cannot use the observations. The message says what to do.
    """
    images: list[Entry] = []
    numbers: list[Entry] = []
    shares: list[Entry] = []  # images that would also be of use as numbers
    problems: list[str] = []
    for path, leaf in _leaves(space):
        axes = image_axes(leaf)
        if axes is None and _is_picture(leaf):
            if obs != "state":
                problems.append(f"{_name(path)} is an array {leaf.shape} {leaf.dtype}, {_ADVICE}")
        elif axes is not None:
            high = 1 if np.all(leaf.high == 1) else 255
            shape = tuple(leaf.shape)
            images.append(Entry(path, axes, shape, str(leaf.dtype), high=high))
            if np.dtype(leaf.dtype).kind == "f" or len(shape) == 2:
                shares.append(images[-1]._replace(use=NUMBERS))
        elif (entry := _numbers_of(path, leaf)) is not None:
            numbers.append(entry)
        elif obs != "pixels":
            kind = type(leaf).__name__
            problems.append(f"{_name(path)} is a {kind}, and cannot be made numbers: {_WRAP}")
    if problems:
        raise UserError("; ".join(problems) + ".")
    if obs == "pixels":
        return tuple(images)
    if obs == "state":
        images, numbers = [], numbers or shares
    if not any(map(size_of, numbers)):
        raise UserError("its observations have no numbers besides images; use obs=pixels.")
    return (*images, *numbers)


_ADVICE = (
    "which could be several kinds of image: wrap it so that one image (height, width, 3) is left, "
    "or leave out the wrapper that stacks frames"
)


def _leaves(space: spaces.Space, path: tuple[str | int, ...] = ()) -> Iterator[tuple[Any, Any]]:
    """The spaces without parts, with the keys that lead to them, in the order of their names."""
    if isinstance(space, spaces.Dict):
        for key in sorted(space.spaces, key=str):
            yield from _leaves(space.spaces[key], (*path, key))
    elif isinstance(space, spaces.Tuple):
        for i, part in enumerate(space.spaces):
            yield from _leaves(part, (*path, i))
    else:
        yield path, space


def image_axes(space: spaces.Space) -> str | None:
    """The axes of an image, one of ``IMAGE_AXES``; None if the space is not one."""
    if not isinstance(space, spaces.Box) or not _has_image_values(space):
        return None
    shape = space.shape
    large = [side >= SMALLEST_SIDE for side in shape]
    if len(shape) == 3 and shape[2] == 3 and all(large[:2]):
        return "hwc"
    for axes in IMAGE_AXES:
        if len(axes) != len(shape):
            continue
        of_axis = dict(zip(axes, shape, strict=True))
        sides = of_axis["h"], of_axis["w"]
        if min(sides) < SMALLEST_SIDE or of_axis.get("c", 3) not in (1, 3):
            continue
        if of_axis.get("n", 1) < min(sides):
            return axes
    return None


def is_image(x: np.ndarray) -> bool:
    """Whether an array is an image without doubt: (height, width, 3) uint8."""
    return x.ndim == 3 and x.shape[-1] == 3 and x.dtype == np.uint8


def _has_image_values(space: spaces.Box) -> bool:
    """Whether the bounds are those of bytes or of shares."""
    if space.dtype == np.uint8 and len(space.shape) >= 3:
        return True
    if np.dtype(space.dtype).kind not in "iuf" or not np.all(space.low == 0):
        return False
    return bool(np.all(space.high == 255) or (space.dtype.kind == "f" and np.all(space.high == 1)))


def _is_picture(space: spaces.Space) -> bool:
    """Whether a space holds the values and the size of images."""
    sides = [side for side in space.shape or () if side >= SMALLEST_SIDE]
    return isinstance(space, spaces.Box) and len(sides) >= 2 and _has_image_values(space)


def _numbers_of(path: tuple[str | int, ...], space: spaces.Space) -> Entry | None:
    """The entry of a space of numbers or texts; None if it is another space."""
    shape = tuple(space.shape or ())
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
        number = space.n if isinstance(space, spaces.Discrete) else space.nvec
        counts = np.reshape(number, -1).tolist()
        starts = np.reshape(space.start, -1).tolist()
        if sum(counts) <= MOST_CLASSES:
            return Entry(path, ONE_HOT, shape, str(space.dtype), tuple(counts), tuple(starts))
    elif np.dtype(space.dtype).kind == "U":  # a Text, or another space of texts
        return Entry(path, UNUSED, shape, "str")
    elif not isinstance(space, spaces.Box | spaces.MultiBinary):
        return None
    return Entry(path, NUMBERS, shape, str(space.dtype))


def size_of(entry: Entry) -> int:
    """The numbers that an entry adds to the vector."""
    if entry.use == UNUSED:
        return 0
    return sum(entry.counts) if entry.use == ONE_HOT else math.prod(entry.shape)


def image_size_of(entries: Sequence[Entry]) -> tuple[int, int] | None:
    """Height and width of the image that `read` makes of the entries; None if it makes none."""
    sizes = [_sides(entry) for entry in entries if entry.use in IMAGE_AXES]
    if not sizes:
        return None
    return max(h for h, _ in sizes), max(w for _, w in sizes) * len(sizes)


def _sides(entry: Entry) -> tuple[int, int]:
    return entry.shape[entry.use.index("h")], entry.shape[entry.use.index("w")]


@functools.cache  # environments are built again and again
def tell_what_is_used(task: str, entries: tuple[Entry, ...]) -> None:
    """Log which images are changed, and which entries are left out."""
    images = [entry for entry in entries if entry.use in IMAGE_AXES]
    for entry in images:
        if "n" in entry.use:
            log.info(
                "%s: %s is a stack of %d frames, of which the newest is used",
                *(task, _name(entry.path), entry.shape[0]),
            )
    if len(images) > 1:
        names = ", ".join(_name(entry.path) for entry in images)
        log.info("%s: the images %s are put side by side", task, names)
    for entry in entries:
        if entry.use == UNUSED:
            log.info("%s: %s is a text, which the agent does not see", task, _name(entry.path))


def _name(path: tuple[str | int, ...]) -> str:
    return repr("/".join(map(str, path))) if path else "its observation"


# --- from an observation, at every step -----------------------------------------------------


def read(entries: Sequence[Entry], observation: Any) -> dict[str, np.ndarray]:
    """Convert an observation of the environment.

    Args:
        entries: those of :func:`entries_of`.
        observation: as ``reset`` and ``step`` of the environment return it. Its images may have any
            size.

    Returns:
        ``image`` (h, w, 3) uint8 and ``vector`` (dim,) float32, where there are such entries.

    Raises:
        ObservationError: the observation is not of that space.
    """
    images: list[np.ndarray] = []
    numbers: list[np.ndarray] = []
    for entry in entries:
        if entry.use == UNUSED:
            continue
        value = _value_at(observation, entry.path)
        (images if entry.use in IMAGE_AXES else numbers).append(_CONVERT[entry.use](entry, value))
    result = {}
    if images:
        result["image"] = _side_by_side(images)
    if numbers:
        result["vector"] = np.concatenate(numbers)
    return result


def _value_at(observation: Any, path: tuple[str | int, ...]) -> Any:
    value = observation
    for key in path:
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            raise ObservationError(f"an observation without {_name(path)}") from None
    return value


def _array(entry: Entry, value: Any) -> np.ndarray:
    try:
        x = np.asarray(value)
    except (TypeError, ValueError) as error:
        raise ObservationError(f"an observation that is not numbers: {error}") from error
    if x.dtype.kind not in "iufb":
        raise ObservationError(f"an observation that is not numbers, but {x.dtype}")
    return x


def _to_image(entry: Entry, value: Any) -> np.ndarray:
    """The image (h, w, 3) uint8 of an entry."""
    x = _array(entry, value)
    declared = np.dtype(entry.dtype)
    colors = entry.shape[entry.use.index("c")] if "c" in entry.use else 1
    fits = x.ndim == len(entry.use) and x.size and (x.dtype.kind == "f") == (declared.kind == "f")
    if not fits or ("c" in entry.use and x.shape[entry.use.index("c")] != colors):
        raise ObservationError(
            f"an image of shape {x.shape} {x.dtype}, but declared {entry.shape} {entry.dtype}"
        )
    x = x[-1] if "n" in entry.use else x
    if "c" not in entry.use:
        x = x[..., None]
    elif entry.use.endswith("chw"):
        x = np.moveaxis(x, 0, -1)
    if x.dtype != np.uint8:
        if not np.isfinite(x).all():
            raise ObservationError("an image with values that are not finite")
        x = np.clip(np.rint(x * 255.0 if entry.high == 1 else x), 0, 255).astype(np.uint8)
    return x if colors == 3 else np.repeat(x, 3, axis=-1)


def _side_by_side(images: Sequence[np.ndarray]) -> np.ndarray:
    """Images of any size beside each other. Each gets the height and width of the largest one."""
    if len(images) == 1:
        return images[0]
    height, width = (max(x.shape[axis] for x in images) for axis in (0, 1))
    return np.hstack([_stretch(x, height, width) for x in images])


def _stretch(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Repeat rows and columns of an image (h, w, 3) until it is (height, width, 3)."""
    rows = np.arange(height) * image.shape[0] // height
    columns = np.arange(width) * image.shape[1] // width
    return image[rows[:, None], columns]


def _to_numbers(entry: Entry, value: Any) -> np.ndarray:
    x = _array(entry, value)
    if x.size != math.prod(entry.shape):
        name = _name(entry.path) if entry.path else "vector"
        shape = x.shape if x.ndim else (1,)
        raise ObservationError(
            f"a {name} of shape {shape} {x.dtype}, but declared {entry.shape} {entry.dtype}"
        )
    with np.errstate(over="ignore"):  # 1e300 is infinite in float32, which is noticed later
        return x.reshape(-1).astype(np.float32)


def _to_one_hot(entry: Entry, value: Any) -> np.ndarray:
    """One-hot values of the choices of an entry, one after the other."""
    x = _to_numbers(entry, value) - np.array(entry.starts, np.float32)
    counts = np.array(entry.counts)
    if not (np.isfinite(x).all() and (x == np.rint(x)).all() and ((x >= 0) & (x < counts)).all()):
        raise ObservationError(f"{value} for {_name(entry.path)}, which is none of its choices")
    result = np.zeros(counts.sum(), np.float32)
    result[np.cumsum(counts) - counts + x.astype(int)] = 1
    return result


_CONVERT = {
    NUMBERS: _to_numbers,
    ONE_HOT: _to_one_hot,
    **dict.fromkeys(IMAGE_AXES, _to_image),
}
