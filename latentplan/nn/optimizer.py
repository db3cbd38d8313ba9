"""LaProp with adaptive gradient clipping and warm-up (the DreamerV3 recipe)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class LaProp(torch.optim.Optimizer):
    """LaProp (Ziyin et al. 2020): momentum over gradients already divided by their RMS.

    Gradients are first clipped per tensor so that their norm is at most ``clip`` times the norm of
    the weights (Brock et al. 2021); the rate rises linearly over ``warmup`` updates.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float,
        *,
        clip: float,
        warmup: int,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-20,
    ):
        defaults = dict(lr=lr, clip=clip, warmup=warmup, beta1=beta1, beta2=beta2, eps=eps)
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient. ``closure`` is not used."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if not self.state[p]:
                    self.state[p].update(
                        step=torch.zeros(()), mean=torch.zeros_like(p), square=torch.zeros_like(p)
                    )
            if params:
                self._update(group, params)

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        states = [self.state[p] for p in params]
        raw = [p.grad for p in params if p.grad is not None]
        # A tensor that starts at zero (output layer, bias) counts as one with a norm of 1e-3.
        limits = torch._foreach_norm(params)
        torch._foreach_clamp_min_(limits, 1e-3)
        torch._foreach_mul_(limits, group["clip"])
        norms = torch._foreach_norm(raw)
        torch._foreach_maximum_(norms, limits)
        torch._foreach_div_(limits, norms)
        grads = torch._foreach_mul(raw, limits)

        torch._foreach_add_([s["step"] for s in states], 1.0)
        step = float(states[0]["step"])
        beta1, beta2 = group["beta1"], group["beta2"]
        squares = [s["square"] for s in states]
        means = [s["mean"] for s in states]
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
        scale = torch._foreach_div(squares, 1 - beta2**step)
        torch._foreach_sqrt_(scale)
        torch._foreach_add_(scale, group["eps"])
        torch._foreach_div_(grads, scale)
        torch._foreach_lerp_(means, grads, 1 - beta1)
        rate = group["lr"] * min(1.0, step / max(1, group["warmup"]))
        torch._foreach_add_(params, means, alpha=-rate / (1 - beta1**step))
