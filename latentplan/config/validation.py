"""Checks of the configuration, which run before anything is built."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import Field, fields, is_dataclass
from functools import cache
from typing import Any, cast

from latentplan.config.schema import (
    ENTROPY_OF_GRADIENT,
    SINKS,
    Bounds,
    Config,
    sink_names,
    uncertainty_members_field,
)
from latentplan.config.tasks import has_environment
from latentplan.types import UserError, shown

LARGEST = 2**64 - 1  # also the largest seed of torch's generators


def schema_sections() -> dict[str, type[Any]]:
    """Every section of the configuration with its dataclass, in the order of the schema."""
    factories = {field.name: field.default_factory for field in fields(Config)}
    return {name: cast(type[Any], x) for name, x in factories.items() if is_dataclass(x)}


def schema_fields() -> Iterator[tuple[str, Field[Any]]]:
    """Every key of the configuration with its field, in the order of the schema."""
    sections = schema_sections()
    for top_field in fields(Config):
        if top_field.name in sections:
            for section_field in fields(sections[top_field.name]):
                yield f"{top_field.name}.{section_field.name}", section_field
        else:
            yield top_field.name, top_field


@cache
def _bounds() -> dict[str, Bounds]:
    return {key: schema_field.metadata["bounds"] for key, schema_field in schema_fields()}


def check(flat: dict[str, Any]) -> None:
    """Check every value by its bounds, and the conditions between several values.

    Args:
        flat: the values of all keys, by dotted key.

    Raises:
        UserError: a value is invalid. The message names the key.
    """
    for key, value in flat.items():
        check_bounds(key, value)
    if flat["behavior.std_min"] >= flat["behavior.std_max"]:
        raise UserError("behavior.std_min must be less than behavior.std_max.")
    for key in ("world.bins", "behavior.bins"):
        if flat[key] % 2 == 0:
            raise UserError(f"{key} must be odd, not {flat[key]}: the middle bin is zero.")
    if flat["world.deter"] % flat["world.blocks"]:
        raise UserError("world.blocks must divide world.deter.")
    window = flat["train.context"] + flat["train.length"]
    if window > flat["replay.capacity"] // flat["env.num_envs"]:
        raise UserError(
            "replay.capacity must hold train.context + train.length rows for each environment."
        )
    _check_offline(flat)
    _check_plan(flat)
    if flat["behavior.improvement"] == "mpdp":
        _check_mpdp(flat)
    _check_ensemble(flat)
    for name in sink_names(flat["log.sinks"]):
        if name not in SINKS:
            raise UserError(f"log.sinks can name {' and '.join(SINKS)}, not {shown(name)}.")


def bounds_of(key: str) -> Bounds:
    """The bounds of a key, as its field in the schema states them."""
    return _bounds()[key]


def check_bounds(key: str, value: object) -> None:
    """Check one value by the bounds of its key.

    Raises:
        UserError: the value is outside the bounds. The message names the key.
    """
    bounds = bounds_of(key)
    if bounds.choices and value not in bounds.choices:
        raise UserError(f"{key} must be one of {', '.join(bounds.choices)}, not {shown(value)}.")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    given = shown(value)
    # The condition is negated because every comparison with NaN is false.
    if not abs(value) <= LARGEST:
        raise UserError(f"{key} must be a finite number that fits into 64 bits, not {given}.")
    if value < bounds.at_least:
        raise UserError(f"{key} must be at least {bounds.at_least}, not {given}.")
    if bounds.above is not None and value <= bounds.above:
        raise UserError(f"{key} must be more than {bounds.above}, not {given}.")
    if bounds.at_most is not None and value > bounds.at_most:
        raise UserError(f"{key} must be at most {bounds.at_most}, not {given}.")


def _check_offline(flat: dict[str, Any]) -> None:
    if not flat["train.offline"]:
        if not has_environment(flat["task"]):
            raise UserError(f"task={flat['task']} has no environment, so it needs train.offline.")
    elif flat["env.num_envs"] != 1:
        raise UserError("train.offline steps no environments: leave env.num_envs at 1.")


def _check_plan(flat: dict[str, Any]) -> None:
    if flat["plan.replan_every"] > flat["plan.horizon"]:
        raise UserError("plan.replan_every must not exceed plan.horizon, where a plan ends.")
    if flat["plan.candidates"] > 1 and flat["plan.search"] == "cross_entropy":
        if flat["plan.elites"] > flat["plan.candidates"]:
            raise UserError("plan.elites must not exceed plan.candidates.")
        if flat["plan.imagine_fraction"]:
            raise UserError(
                "plan.search=cross_entropy does not plan in imagined rollouts, whose actions must "
                "be samples of the policy: set plan.imagine_fraction=0."
            )
    if flat["distill.weight"] and flat["plan.candidates"] == 1:
        raise UserError("distill.weight needs candidates to distill: set plan.candidates.")
    searches = flat["plan.candidates"] > 1 and flat["plan.search"] == "cross_entropy"
    if (
        searches
        and flat["distill.weight"]
        and not (flat["distill.states"] or flat["distill.stored"])
    ):
        raise UserError("distill.weight needs plans: set distill.states, or distill.stored=true.")
    if flat["distill.stored"] and not (searches and flat["plan.explore"]):
        raise UserError(
            "distill.stored stores the plans of a search in the training environments: set "
            "plan.search=cross_entropy, plan.candidates and plan.explore=true."
        )


def _check_mpdp(flat: dict[str, Any]) -> None:
    if flat["behavior.gradient"] != "pathwise":
        raise UserError(
            "behavior.improvement=mpdp differentiates through the model: it needs "
            "behavior.gradient=pathwise."
        )
    plans = flat["plan.candidates"] > 1
    if plans and flat["mpdp.policies"] == "per_step" and flat["plan.imagine_fraction"]:
        raise UserError(
            "mpdp.policies=per_step imagines rollouts with its own policies and never plans in "
            "them: set plan.imagine_fraction=0."
        )
    if plans and flat["plan.imagine_fraction"] == 1:
        raise UserError(
            "plan.imagine_fraction must be less than 1 with behavior.improvement=mpdp: the critic "
            "learns the value of the policy from rollouts that are not planned."
        )
    if flat["mpdp.horizon"] > flat["behavior.horizon"]:
        raise UserError(
            "mpdp.horizon must not exceed behavior.horizon: the objective is computed on windows "
            "of the rollouts."
        )
    keys = ("behavior.entropy", "mpdp.entropy_fraction", "behavior.discount_horizon")
    factors = [flat[key] for key in keys]
    if factors[0] is None:
        factors[0] = ENTROPY_OF_GRADIENT["pathwise"]  # that of MPDP
    if math.prod(factors) >= 1:
        raise UserError(
            f"{' * '.join(keys)} must be less than 1 with behavior.improvement=mpdp: the entropy "
            "bonus is part of the return and proportional to the return scale, so the scale would "
            "grow without limit."
        )


def _check_ensemble(flat: dict[str, Any]) -> None:
    ensemble = "world." + uncertainty_members_field(flat["world.uncertainty"])
    mpdp = flat["behavior.improvement"] == "mpdp"
    mpdp_needs_uncertainty = mpdp and (flat["mpdp.beta"] or flat["mpdp.adaptive_horizon"])
    if flat[ensemble] == 1 and (
        flat["plan.candidates"] > 1
        or flat["world.uncertainty"] == "kl_rest"
        or mpdp_needs_uncertainty
    ):
        raise UserError(
            f"{ensemble} must be at least 2: the uncertainty is the disagreement of the members."
        )
