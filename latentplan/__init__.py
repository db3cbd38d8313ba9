"""latentplan: agents that learn to control from pixels inside a latent world model.

The Python interface: :func:`train`, :func:`evaluate`, :func:`load`, :func:`load_config` and
:func:`make_env`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = [
    "Config",
    "LoadedAgent",
    "UserError",
    "evaluate",
    "load",
    "load_config",
    "make_env",
    "train",
]

if TYPE_CHECKING:
    from latentplan.config.loading import load as load_config
    from latentplan.config.schema import Config
    from latentplan.deploy.loading import LoadedAgent, load
    from latentplan.envs import make_env
    from latentplan.evaluation.evaluate import evaluate
    from latentplan.training.session import train
    from latentplan.types import UserError

_HOMES = {
    "Config": ("config.schema", "Config"),
    "LoadedAgent": ("deploy.loading", "LoadedAgent"),
    "UserError": ("types", "UserError"),
    "evaluate": ("evaluation.evaluate", "evaluate"),
    "load": ("deploy.loading", "load"),
    "load_config": ("config.loading", "load"),
    "make_env": ("envs", "make_env"),
    "train": ("training.session", "train"),
}


def __getattr__(name: str) -> object:
    # Environment workers import this package and must start without torch.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    module, attribute = _HOMES[name]
    return getattr(importlib.import_module(f"{__name__}.{module}"), attribute)
