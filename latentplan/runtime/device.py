"""What torch can use of this machine. Torch is imported only where the answer depends on it."""

from __future__ import annotations

import functools
import logging
import re
from typing import TYPE_CHECKING

from latentplan.types import UserError

if TYPE_CHECKING:
    import torch

log = logging.getLogger("latentplan")


@functools.cache
def has_cuda() -> bool:
    """Whether there is a CUDA GPU, and the first one is not too old for this build of torch: such a
    one is named in a warning. Nothing runs on it: whoever asks may have no use for it."""
    import torch

    if not torch.cuda.is_available():
        return False
    capability = torch.cuda.get_device_capability(0)
    if any(_runs_on(arch, capability) for arch in torch.cuda.get_arch_list()):
        return True
    log.warning(
        "%s is not used: torch %s has nothing for its compute capability %d.%d",
        *(torch.cuda.get_device_name(0), torch.__version__, *capability),
    )
    return False


def _runs_on(arch: str, capability: tuple[int, int]) -> bool:
    """Whether what was compiled for ``arch`` runs there: ``sm_86`` on later GPUs of its generation,
    ``compute_90`` on all later ones."""
    found = re.fullmatch(r"(sm|compute)_(\d+)[a-z]?", arch)
    if found is None:  # no CUDA: what ROCm calls its GPUs
        return True
    major, minor = divmod(int(found[2]), 10)
    if found[1] == "compute":
        return (major, minor) <= capability
    return major == capability[0] and minor <= capability[1]


def pick_device(name: str) -> torch.device:
    """``auto`` takes CUDA where there is any.

    Raises:
        UserError: the device does not exist here.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if has_cuda() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).add_(1)  # with a kernel, which torch may not have for it
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise UserError(
            f"There is no device {name!r} that torch can use here: {reason}."
        ) from error
    return device
