"""The names of discrete actions in films and plans."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from latentplan.envs.actions import choices
from latentplan.types import EnvSpec

Texts = Mapping[str, list[list[str]]]  # {label: a text for each of T frames of B sequences}


def name_actions(spec: EnvSpec, actions: Tensor) -> list[str]:
    """Names of discrete actions (K, A), or their numbers. Zeros are no action, and have no name.

    The list is empty for continuous actions.
    """
    if not spec.action_groups:
        return []
    values = actions.float().cpu().numpy()
    chosen = choices(values, spec.action_groups)
    if spec.action_names:
        names = [spec.action_names[k] for k in chosen[:, 0]]
    else:
        names = ["action " + " ".join(map(str, row)) for row in chosen]
    return [name if x.any() else "" for name, x in zip(names, values, strict=True)]


def action_texts(spec: EnvSpec, **actions: Tensor) -> Texts:
    """The texts of a film that name discrete actions.

    Args:
        spec: of the environment.
        actions: by label, the actions (B, T, A) that led to the frames; zeros where there is none.

    Returns:
        Empty for continuous actions.
    """
    if not spec.action_groups:
        return {}
    return {label: [name_actions(spec, row) for row in x] for label, x in actions.items()}
