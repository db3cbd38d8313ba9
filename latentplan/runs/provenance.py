"""The origin of results: versions, commit, machine and renderer of a session."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from latentplan import __version__
from latentplan.envs import Renderer
from latentplan.types import EnvSpec

PACKAGES = ("torch", "torchvision", "mujoco", "dm_control", "gymnasium", "numpy", "omegaconf")


def describe(spec: EnvSpec, renderer: Renderer | None, bfloat16: bool) -> dict[str, Any]:
    """The description of a session that ``run.json`` records besides the configuration.

    Args:
        spec: observations and actions of the environment.
        renderer: the renderer of this session, or None if no images are drawn.
        bfloat16: whether the agent computes large products in bfloat16.
    """
    return {
        "latentplan": __version__,
        "commit": commit(),
        "command": command(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "machine": {"cores": os.cpu_count(), "processor": processor(), "cuda": _cuda()},
        # The choices of this session, which the configuration may leave open with "auto".
        "precision": "bfloat16" if bfloat16 else "float32",
        "renderer": renderer.description if renderer else "none",
        "render_backend": renderer.backend if renderer else None,
        "render_quality": renderer.quality if renderer else None,
        "spec": spec.to_dict(),
    }


def command() -> list[str]:
    """The command of this process as a user types it, without the folders of this machine."""
    program = Path(sys.argv[0])
    # With `python -m latentplan`, the program is latentplan/__main__.py.
    name = program.parent.name if program.name == "__main__.py" else program.name
    return [name, *sys.argv[1:]]


def _cuda() -> str | None:
    import torch  # `latentplan doctor` imports this module where torch may be missing

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def processor() -> str:
    """The model of the CPU, or its architecture if the system does not name the model."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def version(package: str) -> str | None:
    """The version of an installed package; None if the package is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit of the code, followed by ``+`` if files differ from it.

    Outside a git checkout of this project, the environment variable ``LATENTPLAN_COMMIT`` gives the
    commit. The Docker image sets it. The result is None if the commit is unknown.
    """
    folder = Path(__file__).resolve().parents[1]
    if not (folder.parent / ".git").exists():
        return os.environ.get("LATENTPLAN_COMMIT") or None
    try:
        changed = _git(folder, "status", "--porcelain")
        return _git(folder, "rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    """The output of a git command in ``folder``.

    Raises:
        OSError: git is not installed.
        subprocess.SubprocessError: the command fails or takes more than 10 seconds.
    """
    words = ["git", "-C", str(folder), *arguments]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()
