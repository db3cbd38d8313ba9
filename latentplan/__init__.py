"""latentplan: agents that learn to control things from pixels inside a latent world model."""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["load"]

if TYPE_CHECKING:
    from latentplan.deploy.loading import load


def __getattr__(name: str) -> object:
    # Environment workers import this package and must not pay for torch.
    if name == "load":
        from latentplan.deploy.loading import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
