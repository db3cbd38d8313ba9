"""Compilation of the agent's functions with ``torch.compile``.

Functions are compiled, never modules, so that names in checkpoints stay as they are. Functions that
are not listed here are not compiled. On a CPU, compilation takes about a minute and saves a tenth
of the time of an update; with planning and MPDP it saves a fifth (docs/performance.md).
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
# A function is compiled once for each agent of the process, each shape, and each combination of
# measured uncertainty and gradient. Above this limit torch stops compiling it without a message.
RECOMPILES = 256


def make_agent(config: Config, spec: EnvSpec, device: torch.device) -> tuple[Agent, str]:
    """A new agent, initialized with ``config.seed``, and the result of :func:`compile_agent`."""
    torch.manual_seed(config.seed)
    agent = Agent(spec, config, device)
    return agent, compile_agent(agent, config.train.compile)


def compile_agent(agent: Agent, mode: str) -> str:
    """Compile the agent's functions in place.

    Args:
        mode: ``on``, ``off`` or ``auto``, which is ``on``.

    Returns:
        The mode that is in effect. It is ``off``, and a warning is logged, if nothing can be
        compiled.
    """
    if mode == "off":
        return "off"
    reason = why_not_compilable(agent.device)
    if reason:
        log.warning("nothing is compiled: %s", reason)
        return "off"
    torch._dynamo.config.recompile_limit = RECOMPILES
    # If the compiler fails later, for example because Ctrl-C ends it, functions run uncompiled.
    torch._dynamo.config.suppress_errors = True
    world = agent.world
    methods = (
        "_step",
        "_step_expected",
        "prepare",
        "_encode",
        "_errors",
        "_divergence",
        "_outcome_losses",
    )
    functions: list[tuple[Any, str]] = [
        *((world, name) for name in methods),
        (world.rssm, "_filter"),
        (agent.actor, "forward"),
        (agent.critic, "slow_values"),
        (agent.learner, "_value_loss"),
    ]
    for owner, name in functions:
        setattr(owner, name, torch.compile(getattr(owner, name), dynamic=False))
    return "on"


def why_not_compilable(device: torch.device) -> str | None:
    """The reason, in one line, why functions cannot be compiled on ``device``; None if they can."""
    add: Callable[[torch.Tensor], torch.Tensor] = torch.compile(lambda x: x + 1)
    try:
        add(torch.zeros(1, device=device))
    except Exception as error:  # a missing or broken compiler raises errors of many types
        return str(error).strip().splitlines()[0]
    return None


def is_compiler_failure(error: Exception) -> bool:
    """Whether ``error`` is a failed compilation that ``suppress_errors`` does not catch.

    That setting has no effect on gradient graphs, which are compiled in the first ``backward()``.
    """
    from torch._dynamo.exc import BackendCompilerFailed  # slow to import, and rarely needed
    from torch._inductor.exc import CppCompileError

    return isinstance(error, BackendCompilerFailed | CppCompileError)
