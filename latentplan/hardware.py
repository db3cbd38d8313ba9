"""What torch can use of this machine. Torch is imported only where the answer depends on it."""

from __future__ import annotations

import functools
import logging

log = logging.getLogger("latentplan")


@functools.cache
def has_cuda() -> bool:
    """Whether there is a CUDA GPU that this build of torch has kernels for; a GPU that is too old
    for it is named in a warning."""
    import torch

    if not torch.cuda.is_available():
        return False
    try:
        torch.zeros(1, device="cuda").add_(1)
    except RuntimeError as error:
        log.warning("the GPU cannot be used: %s", str(error).strip().splitlines()[0])
        return False
    return True
