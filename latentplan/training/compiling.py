"""Which functions ``torch.compile`` gets, and what happens without a compiler.

Functions are compiled, never modules, so that names in checkpoints stay as they are. Functions that
are not listed here run as written. On a CPU compiling takes about a minute and saves a tenth of an
update, with planning and MPDP a fifth (docs/performance.md).
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
# A function is compiled once per agent of the process, shape, and combination of measured
# uncertainty and gradient. Beyond this limit a function runs as written, without a message.
RECOMPILES = 256


def make_agent(config: Config, spec: EnvSpec, device: torch.device) -> tuple[Agent, str]:
    """A new agent by the configuration's seed, and the result of :func:`compile_agent`."""
    torch.manual_seed(config.seed)
    agent = Agent(spec, config, device)
    return agent, compile_agent(agent, config.train.compile)


def compile_agent(agent: Agent, mode: str) -> str:
    """Compile the agent's functions in place.

    Args:
        mode: ``on``, ``off`` or ``auto``, which is ``on``.

    Returns:
        The mode that is in effect: ``off`` where nothing can be compiled, with a warning.
    """
    if mode == "off":
        return "off"
    trouble = missing(agent.device)
    if trouble:
        log.warning("nothing is compiled: %s", trouble)
        return "off"
    torch._dynamo.config.recompile_limit = RECOMPILES
    # If the compiler fails later, for example because Ctrl-C ends it, functions run as written.
    torch._dynamo.config.suppress_errors = True
    world = agent.world
    methods = ("_step", "patchify", "_encode", "_errors", "_divergence", "_outcome_losses")
    functions: list[tuple[Any, str]] = [
        *((world, name) for name in methods),
        (world.rssm, "_filter"),
        (agent.actor, "forward"),
        (agent.critic, "slow_value"),
        (agent.learner, "_value_loss"),
    ]
    for owner, name in functions:
        setattr(owner, name, torch.compile(getattr(owner, name), dynamic=False))
    return "on"


def missing(device: torch.device) -> str | None:
    """The reason why nothing can be compiled on ``device``, in one line; None if it can."""
    add: Callable[[torch.Tensor], torch.Tensor] = torch.compile(lambda x: x + 1)
    try:
        add(torch.zeros(1, device=device))
    except Exception as error:  # a missing or broken compiler raises errors of many types
        return str(error).strip().splitlines()[0]
    return None


def is_compiler_failure(error: Exception) -> bool:
    """Whether a compiler failed where ``suppress_errors`` has no effect.

    Graphs of gradients are compiled in their first ``backward()``, which it does not cover.
    """
    from torch._dynamo.exc import BackendCompilerFailed  # slow, and needed only then
    from torch._inductor.exc import CppCompileError

    return isinstance(error, BackendCompilerFailed | CppCompileError)
