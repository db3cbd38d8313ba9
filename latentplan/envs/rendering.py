"""The choice of an OpenGL backend and of the quality of images.

A backend is tried in a subprocess (`latentplan.envs.probe`), because a process cannot change its
OpenGL library later, and a broken driver can end its process. This module never imports OpenGL.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from latentplan.types import UserError

BACKENDS = ("egl", "osmesa", "glfw")
QUALITIES = ("exact", "fast")
DEFAULT = "dm_control's own"  # dm_control's settings, which are timed for comparison only
_TIMEOUT = 90.0  # seconds; a first import of dm_control from a slow disk takes about 20


class Renderer(NamedTuple):
    """How environments draw. It is recorded with a run, because scores depend on it."""

    backend: str  # egl | osmesa | glfw
    quality: str  # exact | fast
    software: bool  # drawn on the CPU
    description: str  # the driver's name


class Probe(NamedTuple):
    """The result of drawing with one backend; ``reason`` says why it does not work."""

    backend: str
    works: bool
    reason: str = ""
    library: str = ""  # the missing library, if that is the reason
    package: str = ""  # the Debian package that contains it
    software: bool = False
    description: str = ""
    seconds: dict[str, float] = {}  # noqa: RUF012  quality or DEFAULT -> seconds per 64 x 64 frame


def probe(backend: str, seconds: float = 0.0, suite: str = "dmc") -> Probe:
    """Draw with ``backend`` in a subprocess, and time it for about ``seconds`` per quality.

    ``suite`` is the one whose task is drawn, ``dmc`` or ``gym``.

    A backend that does not work raises nothing; the result has the reason.
    """
    package_root = str(Path(__file__).resolve().parents[2])
    variables = {k: v for k, v in os.environ.items() if k not in _variables(backend, True)}
    variables |= _variables(backend, software=True)  # the thread setting is ignored by GPUs
    paths = [package_root, variables.get("PYTHONPATH", "")]
    variables["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    command = [sys.executable, "-m", "latentplan.envs.probe", backend, str(seconds), suite]
    try:
        done = subprocess.run(
            command, env=variables, capture_output=True, text=True, timeout=_TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired:
        return Probe(backend, False, f"no image within {_TIMEOUT:.0f} s")
    answer = _last_json(done.stdout)
    if answer is None:
        if done.returncode < 0:
            return Probe(backend, False, f"the driver crashed (signal {-done.returncode})")
        lines = done.stderr.strip().splitlines()
        return Probe(backend, False, lines[-1] if lines else f"exit code {done.returncode}")
    return Probe(backend, **answer)


def _last_json(text: str) -> dict[str, Any] | None:
    for line in reversed(text.splitlines()):  # a driver may print lines of its own
        if line.startswith("{"):
            return json.loads(line)
    return None


def automatic_backends() -> tuple[str, ...]:
    """The backends that ``auto`` tries, in order: that of ``MUJOCO_GL``, else egl and osmesa."""
    named = os.environ.get("MUJOCO_GL", "").strip().lower()
    return (named,) if named in BACKENDS else ("egl", "osmesa")  # glfw needs a screen


def choose_renderer(backend: str = "auto", quality: str = "auto") -> Renderer:
    """Choose the first backend that works.

    Args:
        backend: ``auto`` tries those of :func:`automatic_backends`.
        quality: ``auto`` is ``exact`` on a GPU and ``fast`` in software.

    Raises:
        UserError: no backend works. The message names the missing libraries and their packages.
    """
    if backend not in ("auto", *BACKENDS):
        raise UserError(f"env.renderer={backend} is unknown; use auto, egl, osmesa or glfw.")
    if quality not in ("auto", *QUALITIES):
        raise UserError(f"env.render_quality={quality} is unknown; use auto, exact or fast.")
    failures = []
    for candidate in automatic_backends() if backend == "auto" else (backend,):
        result = _probe_once(candidate)
        if result.works:
            if quality == "auto":
                quality = "fast" if result.software else "exact"
            return Renderer(candidate, quality, result.software, result.description)
        failures.append(result)
    raise UserError(_no_renderer(failures))


@functools.cache
def _probe_once(backend: str) -> Probe:
    return probe(backend)


def _no_renderer(failures: list[Probe]) -> str:
    reasons = "; ".join(f"{failure.backend}: {failure.reason}" for failure in failures)
    packages = sorted({failure.package for failure in failures if failure.package})
    advice = f"apt-get install {' '.join(packages)}, or " if packages else ""
    return (
        f"No image can be drawn on this machine ({reasons}): {advice}use obs=state. "
        "`latentplan doctor` shows details."
    )


def _variables(backend: str, software: bool) -> dict[str, str]:
    variables = {"MUJOCO_GL": backend}
    if backend != "glfw":
        variables["PYOPENGL_PLATFORM"] = backend
    if software:
        # At 64 x 64 pixels llvmpipe's worker threads make drawing slower and take cores from the
        # learner.
        variables["LP_NUM_THREADS"] = "0"
    return variables


def environment_variables(renderer: Renderer) -> dict[str, str]:
    """The variables that ``os.environ`` needs before dm_control or OpenGL is imported."""
    return _variables(renderer.backend, renderer.software)


def enlarge_buffer(model: Any, size: int) -> None:
    """Let a MuJoCo model be drawn in images of up to ``size`` pixels per side, too.

    Call it after :func:`tune_model`, and before a rendering context is created.
    """
    model.vis.global_.offwidth = model.vis.global_.offheight = size


def tune_model(model: Any, quality: str, image_size: int) -> None:
    """Set the visual options of a MuJoCo model, before its rendering context is created.

    ``exact`` makes the offscreen buffer and the shadow map as large as this image needs, since
    dm_control's sizes are those of a screen. The image differs by less than a pixel. ``fast`` draws
    no shadows and takes one sample per pixel.
    """
    enlarge_buffer(model, image_size)
    if quality == "fast":
        model.vis.quality.offsamples = 0
        model.vis.quality.shadowsize = 0
    else:
        model.vis.quality.shadowsize = min(model.vis.quality.shadowsize, 8 * image_size)
