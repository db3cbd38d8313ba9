"""Putting the weights and the optimizer's state of a checkpoint into an agent."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from latentplan.agent import Agent
from latentplan.config.schema import Config
from latentplan.types import EnvSpec, UserError, shown

# Prefixes of weight names in the checkpoints of earlier versions, and the present prefixes.
RENAMED_WEIGHTS = {
    "scale.": "return_scale.",
    "novelty_scale.": "uncertainty_scale.",
    "world.pictures.": "world.image_normalizers.",
}
_VECTORS = "world.vector_normalizers."
# Prefixes of buffers that the checkpoints of earlier versions lack. They keep their first values.
ADDED_WEIGHTS = (_VECTORS, "bonus_scale.")
# Prefixes of statistics of one task's returns and uncertainty, which another run begins anew.
OF_THE_TASK = ("return_scale.", "uncertainty_scale.", "bonus_scale.", "temperature.")
# Each of these is a number of modules, which are made one after the other.
DEPTHS = ("world.layers", "world.vector_layers", "behavior.layers", "behavior.critics")
_STATE = ("mean", "square")  # of the optimizer, for each weight; besides them ``step``


def check_sizes(spec: EnvSpec, config: Config, state: Mapping[str, Tensor], path: Path) -> None:
    """Check that a checkpoint fits a configuration, before an agent takes memory for its weights.

    Args:
        spec: observations and actions of the checkpoint.
        config: the configuration of the run.
        state: the agent's state dictionary from the checkpoint.
        path: the checkpoint file, for error messages.

    Raises:
        UserError: the checkpoint belongs to another architecture, or the configuration gives sizes
            that no agent can have.
    """
    for key in DEPTHS:
        section, name = key.split(".")
        depth = getattr(getattr(config, section), name)
        if depth > len(state):
            raise UserError(
                f"{path} is a checkpoint of another architecture: it has {len(state)} weights, and "
                f"the run's configuration has {key}={depth}."
            )
    try:
        # Tensors of this device have shapes and no memory.
        with torch.device("meta"):
            agent = Agent(spec, config, "meta")
    except (RuntimeError, OverflowError, MemoryError, TypeError, ValueError) as error:
        raise UserError(
            f"No agent has the sizes in the configuration beside {path}: restore config.yaml."
        ) from error
    _check_shapes(agent, _with_present_names(state), path)


def restore(agent: Agent, state: Mapping[str, Tensor], path: Path) -> None:
    """Load a checkpoint's weights into an agent.

    Names of weights that an earlier version saved are mapped to the present names. An agent of a
    version without statistics of vectors goes on without them.

    Args:
        agent: receives the weights.
        state: the agent's state dictionary from the checkpoint.
        path: the checkpoint file, for error messages.

    Raises:
        UserError: the checkpoint belongs to another architecture, or a weight is not finite. The
            agent is unchanged.
    """
    state = _with_present_names(state)
    _check_shapes(agent, state, path)
    _check_finite(state, path)
    own = agent.state_dict()
    missing = [name for name in own if name not in state]
    if any(name.startswith(_VECTORS) for name in missing):
        _freeze_vector_normalizers(agent)
    agent.load_state_dict({**{name: own[name] for name in missing}, **state})


class Copied(NamedTuple):
    """What :func:`copy_fitting` has copied."""

    layers: int  # copied ones
    fresh: list[str]  # descriptions of the layers that have kept their weights


def copy_fitting(agent: Agent, state: Mapping[str, Tensor], path: Path) -> Copied:
    """Copy the layers of a checkpoint that an agent has too, in the same sizes.

    The agent may have other observations, actions and widths than that of the checkpoint. A layer
    is copied as a whole, with its running statistics. The scales of returns and uncertainty, and a
    tuned temperature, belong to the task of the checkpoint and are not copied.

    Args:
        agent: receives the weights.
        state: the agent's state dictionary from the checkpoint.
        path: the checkpoint file, for error messages.

    Raises:
        UserError: no layer with weights fits, or a weight is not finite. The agent is unchanged.
    """
    state, own = _with_present_names(state), agent.state_dict()
    there, here = _layers(state), _layers(own)
    copied = [layer for layer in here if there.get(layer) == here[layer]]
    names = [name for layer in copied for name in here[layer]]
    weights = {name for name, _ in agent.named_parameters()}
    if weights.isdisjoint(names):
        raise UserError(f"{path} has no layer that fits this agent: its sizes are other ones.")
    state = {name: state[name] for name in names}
    _check_finite(state, path)
    if any(x.startswith("world.encoder.mlp.") for x in names) and not any(
        x.startswith(_VECTORS) for x in there
    ):
        _freeze_vector_normalizers(agent)  # the encoder of an earlier version is used to none
    agent.load_state_dict({**own, **state})
    fresh = [layer for layer in here if layer not in copied]
    return Copied(len(copied), [_difference(x, there.get(x, {}), here[x]) for x in fresh])


def _layers(state: Mapping[str, Tensor]) -> dict[str, dict[str, str]]:
    """The sizes of weights, by layer and name, without those of the task."""
    layers: dict[str, dict[str, str]] = {}
    for name, weight in state.items():
        if not name.startswith(OF_THE_TASK):
            layers.setdefault(name.rpartition(".")[0], {})[name] = _described(weight)
    return layers


def _difference(layer: str, there: Mapping[str, str], here: Mapping[str, str]) -> str:
    """A layer with the sizes of its first weight that differs."""
    for name in (*here, *there):
        sizes = [x.get(name, "nothing") for x in (there, here)]
        if sizes[0] != sizes[1]:
            break
    return f"{layer} (there {sizes[0]}, here {sizes[1]})"


def _check_finite(state: Mapping[str, Tensor], path: Path) -> None:
    for name, weight in state.items():
        if weight.is_floating_point() and not weight.isfinite().all():
            raise UserError(f"{path} has numbers that are not finite in {name}.")


def _freeze_vector_normalizers(agent: Agent) -> None:
    """Let vectors pass as they did in versions without statistics of vectors."""
    for normalizer in agent.world.vector_normalizers.values():
        normalizer.freeze()


def restore_optimizer(agent: Agent, state: Mapping[int, Mapping[str, Tensor]], path: Path) -> None:
    """Load the running means of a checkpoint into an agent's optimizer.

    The optimizer's settings are those of the agent's configuration.

    Args:
        agent: the agent, whose optimizer is set.
        state: running means of each weight, by the weight's number.
        path: the checkpoint file, for error messages.

    Raises:
        UserError: the state belongs to another architecture. The optimizer is unchanged.
    """
    weights = [p for group in agent.optimizer.param_groups for p in group["params"]]
    for index, means in state.items():
        shape = weights[index].shape if index < len(weights) else None
        fits = set(means) == {"step", *_STATE} and _is_number(means["step"])
        if not fits or any(means[name].shape != shape for name in _STATE):
            raise UserError(
                f"{path} is a checkpoint of another architecture: its optimizer has another state "
                f"for weight {index}."
            )
        if not 0 <= float(means["step"]) < float("inf"):
            raise UserError(f"{path} is damaged: its optimizer has a wrong number of steps.")
    groups: list[dict[str, Any]] = agent.optimizer.state_dict()["param_groups"]
    agent.optimizer.load_state_dict({"state": dict(state), "param_groups": groups})


def _with_present_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {_present_name(name): weight for name, weight in state.items()}


def _present_name(name: str) -> str:
    """The present name of a weight or buffer that an earlier version saved."""
    for old, new in RENAMED_WEIGHTS.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _check_shapes(agent: Agent, state: Mapping[str, Tensor], path: Path) -> None:
    """Raise a UserError if a weight is missing, or has another shape or kind of number."""
    own = agent.state_dict()
    for name in (*own, *state):
        if name not in state and name.startswith(ADDED_WEIGHTS):
            continue
        there, here = _described(state.get(name)), _described(own.get(name))
        if there != here:
            raise UserError(
                f"{path} is a checkpoint of another architecture: it has {there} for "
                f"{shown(name, quoted=False)}, this agent has {here}. The run.json beside it names "
                "the commit that made it."
            )


def _described(weight: Tensor | None) -> str:
    """The shape of a weight, and whether it holds integers; all kinds of floats fit each other."""
    if weight is None:
        return "nothing"
    shape = str(tuple(weight.shape))
    return shape if weight.is_floating_point() else f"{shape} integers"


def _is_number(x: Tensor) -> bool:
    return x.numel() == 1 and x.is_floating_point()
