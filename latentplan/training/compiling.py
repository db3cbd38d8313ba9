"""``torch.compile``, in one place: which functions, when, and what happens without a compiler.

Functions are compiled, never modules: names in checkpoints stay as they are, and what is not named
here runs as written. ``cell``: one step of the model, of filtering, of the policy. ``full``: also
what runs once per update over all rows (coders, divergences, heads, the critic).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from latentplan.agent import Agent
from latentplan.config.schema import Config
from latentplan.types import EnvSpec

log = logging.getLogger("latentplan")
# One per agent of the process, shape, measured or not, with gradient or without: past the limit a
# function silently runs as written.
RECOMPILES = 256


def make_agent(config: Config, spec: EnvSpec, device: torch.device) -> tuple[Agent, str]:
    """A new agent of the configuration's seed, and how it is compiled (:func:`compile_agent`)."""
    torch.manual_seed(config.seed)
    agent = Agent(spec, config, device)
    return agent, compile_agent(agent, config.train.compile)


def compile_agent(agent: Agent, mode: str) -> str:
    """Compile the agent's functions in place.

    Args:
        mode: ``off``, ``cell``, ``full``, or ``auto``: ``cell`` on CUDA, else ``full``, which was
            seen to save a tenth of an update on a CPU, with planning and MPDP a fifth, for about a
            minute of compiling at the start (docs/performance.md).

    Returns:
        The mode that is in effect: ``off`` where nothing can be compiled, with a warning.
    """
    if mode == "auto":
        mode = "cell" if agent.device.type == "cuda" else "full"
    if mode == "off":
        return mode
    trouble = missing(agent.device)
    if trouble:
        log.warning("nothing is compiled: %s", trouble)
        return "off"
    torch._dynamo.config.recompile_limit = RECOMPILES
    # A compiler that fails later, killed by the Ctrl-C that asks a run to save, say: as written.
    torch._dynamo.config.suppress_errors = True
    world = agent.world
    named: list[tuple[Any, str]] = [
        *((world, "_step"), (world.rssm, "_filter")),
        *((agent.actor, "forward"), (agent.critic, "slow_value")),
    ]
    if mode == "full":
        over_rows = ("patchify", "_encode", "_errors", "_divergence", "_outcome_losses")
        named += [*((world, name) for name in over_rows), (agent.learner, "_value_loss")]
    for owner, name in named:
        setattr(owner, name, torch.compile(getattr(owner, name), dynamic=False))
    return mode


def missing(device: torch.device) -> str | None:
    """Why nothing can be compiled here, in one line; None where something can."""
    add: Callable[[torch.Tensor], torch.Tensor] = torch.compile(lambda x: x + 1)
    try:
        add(torch.zeros(1, device=device))
    except Exception as error:  # whatever a compiler that is not there, or broken, may raise
        return str(error).strip().splitlines()[0]
    return None


def is_compiler_failure(error: Exception) -> bool:
    """Whether a compiler failed in a place that ``suppress_errors`` does not cover: graphs of
    gradients are compiled in their first ``backward()``."""
    from torch._dynamo.exc import BackendCompilerFailed  # slow, and needed only then
    from torch._inductor.exc import CppCompileError

    return isinstance(error, BackendCompilerFailed | CppCompileError)
