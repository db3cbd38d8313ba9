"""How much memory a run needs at least, before it starts."""

from __future__ import annotations

import logging

import torch

from latentplan.agent import Agent
from latentplan.config.schema import Config
from latentplan.data.replay import Replay
from latentplan.runtime.device import total_memory
from latentplan.runtime.disk import gigabytes
from latentplan.types import EnvSpec, UserError

log = logging.getLogger("latentplan")
FLOAT_BYTES = 4
ARRAYS_PER_WEIGHT = 4  # the weight, its gradient, and two running means of the optimizer


def agent_bytes(agent: Agent) -> int:
    """Bytes of the weights, their gradients, the optimizer and the buffers."""
    weights = sum(p.numel() for p in agent.parameters())
    buffers = sum(b.numel() for b in agent.buffers())
    return FLOAT_BYTES * (ARRAYS_PER_WEIGHT * weights + buffers)


def update_bytes(agent: Agent, config: Config, spec: EnvSpec) -> int:
    """Bytes that an update needs at least, for its batch and its latent states.

    Counted are observations and their reconstructions, the posterior states of the batch, and the
    states of imagined rollouts. Values within the networks come on top.
    """
    train = config.train
    rows = train.batch * train.length
    observation = sum(torch.Size(shape).numel() for shape, _ in spec.obs.values())
    state = sum(x.numel() for x in agent.initial(1) if isinstance(x, torch.Tensor))
    imagined = config.behavior.starts_fraction * rows * config.behavior.horizon
    return int(FLOAT_BYTES * (2 * rows * observation + (rows + imagined) * state))


def check_memory(agent: Agent, config: Config, spec: EnvSpec) -> None:
    """Log how much memory a run needs at least, and refuse one that cannot fit.

    Raises:
        UserError: the device has less memory than that.
    """
    own, update = agent_bytes(agent), update_bytes(agent, config, spec)
    total = total_memory(agent.device)
    needs = f"{gigabytes(own)} for the agent and its optimizer, {gigabytes(update)} for an update"
    if own + update > total:
        raise UserError(
            f"The run needs at least {needs}, but {agent.device} has {gigabytes(total)}: use "
            "another size, or a smaller train.batch or behavior.starts_fraction."
        )
    log.info("memory: at least %s; %s has %s", needs, agent.device, gigabytes(total))
    capacity, envs = config.replay.capacity, config.env.num_envs
    size = Replay.size_bytes(spec, capacity, envs, plans=config.distill.stored)
    log.info(
        "replay: %s rows, %s on disk, of which the system keeps in memory what is free",
        *(f"{config.replay.capacity:,}", gigabytes(size)),
    )
