"""Draws a few frames with one backend, and prints the result as JSON.

It runs in a process of its own (``python -m latentplan.envs.probe BACKEND SECONDS SUITE``); see
`latentplan.envs.rendering.probe`.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from collections.abc import Callable

from latentplan.envs import dmc, gym
from latentplan.envs.rendering import DEFAULT, QUALITIES, Renderer

# Per backend: alternative libraries, and the Debian package that contains the first one.
_LIBRARIES = {
    "egl": (
        (("libEGL.so.1",), "libegl1"),
        (("libGL.so.1", "libOpenGL.so.0"), "libgl1"),
        (("libEGL_mesa.so.0", "libEGL_nvidia.so.0"), "libegl-mesa0"),
    ),
    "osmesa": ((("libOSMesa.so.8", "libOSMesa.so.6", "libOSMesa.so"), "libosmesa6"),),
    "glfw": ((("libGL.so.1",), "libgl1"),),
}
GYM_TASK = "Hopper-v5"
_SOFTWARE = ("llvmpipe", "softpipe", "swrast", "software")
_BLACK = 1.0  # gray level below which a frame is black; the suite's images are near 75
_HINTS = {
    "egl": "no EGL device can be opened; the software device needs the Debian package "
    "libgl1-mesa-dri, and in Docker the NVIDIA device needs "
    "NVIDIA_DRIVER_CAPABILITIES=compute,utility,graphics",
    "osmesa": "OSMesa cannot be loaded",
    "glfw": "there is no screen to open a window on",
}


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def missing_library(backend: str, loads: Callable[[str], bool] = _loads) -> tuple[str, str] | None:
    """The first library that ``backend`` lacks and its Debian package, or None."""
    for names, package in _LIBRARIES[backend]:
        if not any(loads(name) for name in names):
            return names[0], package
    return None


def _time_frames(render: Callable[[], object], seconds: float) -> float:
    """The median of the seconds per frame, over as many frames as fit into ``seconds``."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        render()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def _time_default(seconds: float) -> float:
    """:func:`_time_frames` for dm_control's own settings, for comparison."""
    from dm_control import suite

    physics = suite.load("cheetah", "run").physics
    render = lambda: physics.render(64, 64, camera_id=0)  # noqa: E731
    render()
    try:
        return _time_frames(render, seconds)
    finally:
        physics.free()


def draw_gym(backend: str, seconds: float) -> dict[str, object]:
    """As :func:`draw`, for a MuJoCo task of Gymnasium, as a worker draws it."""
    timings, means = {}, []
    for quality in QUALITIES:
        renderer = Renderer(backend, quality, True, "")
        simulator = gym.build(GYM_TASK, "pixels", "", 64, renderer)
        try:
            simulator.reset(seed=0, episode=0)
            means.append(float(simulator.observe()["image"].mean()))
            timings[quality] = _time_frames(simulator.observe, seconds)
        finally:
            simulator.close()
    black = min(means) < _BLACK
    reason = "it draws black frames" if black else ""
    return {"works": not black, "reason": reason, "seconds": timings}


def draw(backend: str, seconds: float) -> dict[str, object]:
    """The fields of a `Probe`, for a backend that draws. OpenGL's exceptions are not caught."""
    timings, means, description = {}, [], ""
    for quality in QUALITIES if seconds else QUALITIES[-1:]:
        simulator = dmc.build("cheetah_run", "pixels", 64, Renderer(backend, quality, True, ""))
        try:
            simulator.reset(seed=0, episode=0)
            means.append(float(simulator.render().mean()))  # the first frame compiles shaders
            description = simulator.describe_renderer()
            if seconds:
                timings[quality] = _time_frames(simulator.render, seconds)
        finally:
            simulator.close()
    if seconds:
        timings[DEFAULT] = _time_default(seconds)
    black = min(means) < _BLACK
    return {
        "works": not black,
        "reason": "it draws black frames" if black else "",
        "software": any(word in description.lower() for word in _SOFTWARE),
        "description": description,
        "seconds": timings,
    }


def _explain(backend: str, error: Exception) -> str:
    """The error in one line, in plain words where its meaning is known."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    if isinstance(error, AttributeError) and "NoneType" in text:
        return _HINTS[backend]  # PyOpenGL's error for a missing library
    if isinstance(error, ImportError | RuntimeError) or "gladLoadGL" in text:
        return f"{_HINTS[backend]} ({text})"
    return f"{type(error).__name__}: {text}"


def main(backend: str, seconds: float, suite: str) -> None:
    """Write one line of JSON to standard output."""
    missing = missing_library(backend)
    if missing is not None:
        library, package = missing
        reason = f"{library} is missing (Debian package {package})"
        answer = {"works": False, "reason": reason, "library": library, "package": package}
    else:
        try:
            answer = (draw_gym if suite == "gym" else draw)(backend, seconds)
        except Exception as error:  # drivers and PyOpenGL may raise any exception
            answer = {"works": False, "reason": _explain(backend, error)}
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), sys.argv[3])
