"""The devices that torch can use. Torch is imported only inside the functions that need it."""

from __future__ import annotations

import functools
import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from latentplan.types import UserError

if TYPE_CHECKING:
    import torch

log = logging.getLogger("latentplan")


@functools.cache
def has_cuda() -> bool:
    """Whether there is a CUDA GPU that this build of torch supports.

    A first GPU that is too old is named in a warning. Nothing is run on the GPU.
    """
    import torch

    if not torch.cuda.is_available():
        return False
    capability = torch.cuda.get_device_capability(0)
    if any(_runs_on(arch, capability) for arch in torch.cuda.get_arch_list()):
        return True
    log.warning(
        "%s is not used: torch %s does not support its compute capability %d.%d",
        *(torch.cuda.get_device_name(0), torch.__version__, *capability),
    )
    return False


def _runs_on(arch: str, capability: tuple[int, int]) -> bool:
    """Whether code that was compiled for ``arch`` runs on a GPU of this compute capability.

    ``sm_86`` runs on later GPUs of its generation, ``compute_90`` on all later GPUs.
    """
    parts = re.fullmatch(r"(sm|compute)_(\d+)[a-z]?", arch)
    if parts is None:  # a name of ROCm
        return True
    major, minor = divmod(int(parts[2]), 10)
    if parts[1] == "compute":
        return (major, minor) <= capability
    return major == capability[0] and minor <= capability[1]


def pick_device(name: str) -> torch.device:
    """The torch device of this name; ``auto`` is CUDA where there is a GPU, else the CPU.

    Raises:
        UserError: there is no such device, or torch cannot use it.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if has_cuda() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).add_(1)  # runs a kernel, which torch may lack
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise UserError(
            f"There is no device {name!r} that torch can use here: {reason}."
        ) from error
    return device


def total_memory(device: torch.device) -> int:
    """Bytes of memory that a device has. For the CPU, a container's limit counts."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[1])
    total = int(psutil.virtual_memory().total)
    try:
        return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # there is no such file, or no limit ("max")
        return total
