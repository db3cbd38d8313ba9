"""``latentplan doctor``: a report on rendering, packages and hardware of this machine."""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path

import psutil

from latentplan.envs.probe import GYM_TASK
from latentplan.envs.rendering import BACKENDS, DEFAULT, QUALITIES, Probe, automatic_backends, probe
from latentplan.runs.provenance import version
from latentplan.runtime.device import has_cuda

# A release of one of these packages may not work with another release of the other one.
TESTED = {"dm_control": "1.0.50", "mujoco": "3.17.0"}
_PACKAGES = (*TESTED, "gymnasium", "numpy", "torch", "torchvision", "tensorboard")
_SECONDS = 0.7  # seconds of timing per backend and quality
_LOW_DISK_GIB = 10.0
_GIB = 2**30


def diagnose(folder: str | Path = ".") -> tuple[str, bool]:
    """Check all parts that training needs. It takes some seconds.

    A missing part is in the report; it is not an error.

    Args:
        folder: the folder for runs, whose disk is checked.

    Returns:
        The report (several lines of text), and whether training from pixels works here.
    """
    versions, warnings = _versions()
    probes = [probe(backend, _SECONDS) for backend in BACKENDS]
    by_name = {p.backend: p for p in probes}
    automatic = [by_name[backend] for backend in automatic_backends()]
    chosen = next((p for p in automatic if p.works), None)
    gym = probe(chosen.backend, _SECONDS, "gym") if chosen else None
    devices, device_warnings = _devices(chosen)
    machine, machine_warnings = _machine(Path(folder))
    warnings += device_warnings + machine_warnings
    lines = [
        "Versions",
        *versions,
        "Rendering (64 x 64, cheetah; time per frame)",
        *[_describe(p) for p in probes],
        *([_describe_gym(gym)] if gym else []),
        "Machine",
        *devices,
        *machine,
    ]
    if warnings:
        lines += ["Warnings", *warnings]
    lines += ["Verdict", "  " + _verdict(chosen, gym, automatic)]
    return "\n".join(lines), gym is not None and gym.works


def _versions() -> tuple[list[str], list[str]]:
    versions = {package: version(package) for package in _PACKAGES}
    lines = [f"  python {platform.python_version()} on {platform.platform()}"]
    lines.append("  " + ", ".join(f"{name} {number}" for name, number in versions.items()))
    warnings = [f"  {name} is not installed" for name, number in versions.items() if not number]
    untested = {name: versions[name] for name in TESTED if versions[name] != TESTED[name]}
    if all(versions[name] for name in TESTED) and untested:
        pair = " with ".join(f"{name} {versions[name]}" for name in TESTED)
        tested = " with ".join(f"{name} {number}" for name, number in TESTED.items())
        warnings.append(f"  {pair} is an untested pair; {tested} is known to work")
    return lines, warnings


def _describe(result: Probe) -> str:
    if not result.works:
        return f"  {result.backend:7} does not work: {result.reason}"
    kind = "software" if result.software else "GPU"
    return f"  {result.backend:7} works: {_times(result)}; not black; {kind}: {result.description}"


def _describe_gym(result: Probe) -> str:
    if not result.works:
        return f"  gym:{GYM_TASK} is not drawn with {result.backend}: {result.reason}"
    return f"  gym:{GYM_TASK} is drawn with {result.backend}: {_times(result)}; not black"


def _times(result: Probe) -> str:
    return ", ".join(
        f"{quality} {1000 * result.seconds[quality]:.1f} ms ({1 / result.seconds[quality]:.0f}/s)"
        for quality in (*QUALITIES, DEFAULT)
        if quality in result.seconds
    )


def _devices(chosen: Probe | None) -> tuple[list[str], list[str]]:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: one of its shared libraries does not load
        reason = str(error).splitlines()[0]
        return [f"  torch cannot be imported: {reason}"], ["  training needs torch"]
    warnings = []
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        lines = [f"  CUDA {torch.version.cuda}: {', '.join(names)}"]
        if not has_cuda():
            warnings.append(
                f"  torch {torch.__version__} does not support {names[0]}, which is not used"
            )
        if chosen is not None and chosen.software:
            warnings.append(
                "  images are rendered in software although there is a GPU; in Docker, NVIDIA's "
                "EGL needs NVIDIA_DRIVER_CAPABILITIES=compute,utility,graphics"
            )
    else:
        lines = ["  no CUDA device: training runs on the CPU"]
        if shutil.which("nvidia-smi"):
            warnings.append(
                f"  there is an NVIDIA driver, but torch {torch.__version__} finds no CUDA device"
            )
    from latentplan.runtime.device import pick_device
    from latentplan.training.compiling import why_not_compilable

    obstacle = why_not_compilable(pick_device("auto"))
    if obstacle is None:
        lines.append("  torch.compile works")
    else:
        warnings.append(f"  updates take longer, because torch.compile does not work: {obstacle}")
    return lines, warnings


def _machine(folder: Path) -> tuple[list[str], list[str]]:
    memory = psutil.virtual_memory()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / _GIB
    lines = [
        f"  {len(os.sched_getaffinity(0))} cores, memory {memory.total / _GIB:.1f} GiB "
        f"({memory.available / _GIB:.1f} free), disk {free:.1f} GiB free at {folder.resolve()}"
    ]
    if free >= _LOW_DISK_GIB:
        return lines, []
    return lines, [f"  the replay of a long run from pixels may need {_LOW_DISK_GIB:.0f} GiB"]


def _verdict(chosen: Probe | None, gym: Probe | None, automatic: list[Probe]) -> str:
    if chosen is not None and gym is not None and not gym.works:
        return (
            f"the Control Suite is rendered with {chosen.backend}, but Gymnasium's MuJoCo tasks "
            "cannot be rendered here"
        )
    if chosen is not None:
        quality = "fast" if chosen.software else "exact"
        return f"ready; env.renderer=auto renders with {chosen.backend}, quality {quality}"
    packages = sorted({p.package for p in automatic if p.package})
    advice = f"apt-get install {' '.join(packages)}, or " if packages else ""
    return f"no images can be rendered here: {advice}train with obs=state"
