"""Where results come from: versions, commit, machine and renderer of a session."""

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
    """What a reader of the results must know besides the configuration.

    Args:
        bfloat16: whether the agent's large products are rounded to it.
    """
    return {
        "latentplan": __version__,
        "commit": commit(),
        "command": sys.argv,
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "machine": {"cores": os.cpu_count(), "processor": processor(), "cuda": _cuda()},
        "precision": "bfloat16" if bfloat16 else "float32",  # of products; auto asks the hardware
        "renderer": renderer.description if renderer else "none",
        # What was chosen for this session, not what was asked for: pictures depend on it.
        "render_backend": renderer.backend if renderer else None,
        "render_quality": renderer.quality if renderer else None,
        "spec": spec.to_dict(),
    }


def _cuda() -> str | None:
    import torch  # the doctor asks for versions where it may be missing

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def processor() -> str:
    """The model of the CPU, or its architecture where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def version(package: str) -> str | None:
    """Of an installed package, else None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit of the code, with ``+`` when files differ from it. Outside a checkout of its own
    that of ``LATENTPLAN_COMMIT``, which a Docker image sets, or None."""
    folder = Path(__file__).resolve().parents[1]
    if not (folder.parent / ".git").exists():
        return os.environ.get("LATENTPLAN_COMMIT") or None
    try:
        run = lambda *args: subprocess.run(  # noqa: E731
            ["git", "-C", str(folder), *args],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()
        return run("rev-parse", "--short", "HEAD") + ("+" if run("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None
