"""Which OpenGL backend draws here, and how well it must draw.

A backend is tried in a subprocess (`latentplan.envs.probe`): loading OpenGL is a one-way street in
a process, and a broken driver can take its process along. Nothing here imports OpenGL.
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
DEFAULT = "dm_control's own"  # how it draws when nothing is set; timed to compare, never used
_PATIENCE = 90.0  # seconds; a cold first import of dm_control from a slow disk takes some 20


class Renderer(NamedTuple):
    """How environments draw; recorded with a run, because scores depend on it."""

    backend: str  # egl | osmesa | glfw
    quality: str  # exact | fast
    software: bool  # no GPU behind it
    description: str  # what the driver calls itself


class Probe(NamedTuple):
    """What came of drawing with one backend. ``works`` false: see ``reason``."""

    backend: str
    works: bool
    reason: str = ""
    library: str = ""  # the missing one, where that is the reason
    package: str = ""  # and the Debian package that brings it
    software: bool = False
    description: str = ""
    seconds: dict[str, float] = {}  # noqa: RUF012  quality or DEFAULT -> seconds per 64 x 64 frame


def probe(backend: str, seconds: float = 0.0) -> Probe:
    """Draw with ``backend`` in a subprocess; time it for about ``seconds`` per quality.

    Never raises for a backend that does not work: the reason is in the result.
    """
    package_root = str(Path(__file__).resolve().parents[2])
    variables = {k: v for k, v in os.environ.items() if k not in _variables(backend, True)}
    variables |= _variables(backend, software=True)  # the thread setting is ignored by GPUs
    paths = [package_root, variables.get("PYTHONPATH", "")]
    variables["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    command = [sys.executable, "-m", "latentplan.envs.probe", backend, str(seconds)]
    try:
        done = subprocess.run(
            command, env=variables, capture_output=True, text=True, timeout=_PATIENCE, check=False
        )
    except subprocess.TimeoutExpired:
        return Probe(backend, False, f"no picture within {_PATIENCE:.0f} s")
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
    """What ``auto`` tries, in order: the one that ``MUJOCO_GL`` names, else egl and osmesa."""
    named = os.environ.get("MUJOCO_GL", "").strip().lower()
    return (named,) if named in BACKENDS else ("egl", "osmesa")  # glfw needs a screen


def choose_renderer(backend: str = "auto", quality: str = "auto") -> Renderer:
    """The first backend that works (egl, then osmesa; or the one that ``MUJOCO_GL`` names).

    ``quality`` auto is ``exact`` on a GPU and ``fast`` in software. Raises `UserError` naming the
    missing libraries and their Debian packages when nothing works.
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
        f"No picture can be drawn on this machine ({reasons}): {advice}use obs=state; "
        "`latentplan doctor` tells more."
    )


def _variables(backend: str, software: bool) -> dict[str, str]:
    variables = {"MUJOCO_GL": backend}
    if backend != "glfw":
        variables["PYOPENGL_PLATFORM"] = backend
    if software:
        # llvmpipe's worker threads cost more than they give at 64 x 64, and the learner wants
        # the cores.
        variables["LP_NUM_THREADS"] = "0"
    return variables


def environment_variables(renderer: Renderer) -> dict[str, str]:
    """What must be in ``os.environ`` before dm_control (or OpenGL) is imported."""
    return _variables(renderer.backend, renderer.software)


def tune_model(model: Any, quality: str, image_size: int) -> None:
    """Set a MuJoCo model's visual options, before its rendering context is made.

    ``exact`` sizes the offscreen buffer and the shadow map for this picture: dm_control's own
    sizes are made for screens. The picture stays the same but for what lies below one pixel.
    ``fast`` draws no shadows and takes one sample per pixel.
    """
    model.vis.global_.offwidth = model.vis.global_.offheight = image_size
    if quality == "fast":
        model.vis.quality.offsamples = 0
        model.vis.quality.shadowsize = 0
    else:
        model.vis.quality.shadowsize = min(model.vis.quality.shadowsize, 8 * image_size)
