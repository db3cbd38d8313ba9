"""Refuses configurations that no run could use, before anything is built."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import Field, fields, is_dataclass
from functools import cache
from math import prod
from typing import Any

from latentplan.config.schema import Bounds, Config, uncertainty_members_field
from latentplan.types import UserError


def schema_fields() -> Iterator[tuple[str, Field[Any]]]:
    """Every key of the configuration with its field, in the order of the schema."""
    for top in fields(Config):
        if is_dataclass(top.default_factory):
            for one in fields(top.default_factory):
                yield f"{top.name}.{one.name}", one
        else:
            yield top.name, top


@cache
def _bounds() -> dict[str, Bounds]:
    return {key: one.metadata["bounds"] for key, one in schema_fields()}


def check(flat: dict[str, Any]) -> None:
    """Check every value, alone and together with others.

    Args:
        flat: all keys, dotted.

    Raises:
        UserError: naming the key.
    """
    for key, value in flat.items():
        check_bounds(key, value)
    if flat["behavior.std_min"] >= flat["behavior.std_max"]:
        raise UserError("behavior.std_min must be less than behavior.std_max.")
    for key in ("world.bins", "behavior.bins"):
        if flat[key] % 2 == 0:
            raise UserError(f"{key} must be odd, so that one bin is zero, not {flat[key]}.")
    if flat["world.deter"] % flat["world.blocks"]:
        raise UserError("world.blocks must divide world.deter.")
    if flat["train.length"] > flat["replay.capacity"] // flat["env.num_envs"]:
        raise UserError("replay.capacity must hold train.length rows of each environment.")
    _check_plan(flat)
    if flat["behavior.improvement"] == "mpdp":
        _check_mpdp(flat)
    _check_ensemble(flat)


def bounds_of(key: str) -> Bounds:
    """The bounds that stand beside the field of ``key``."""
    return _bounds()[key]


def check_bounds(key: str, value: object) -> None:
    """Check one value by the bounds that stand beside its field.

    Raises:
        UserError: naming the key.
    """
    bounds = bounds_of(key)
    if bounds.choices and value not in bounds.choices:
        raise UserError(f"{key} must be one of {', '.join(bounds.choices)}, not {value!r}.")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    # Conditions are written such that a value that is not a number fails them.
    if not value >= bounds.at_least:
        raise UserError(f"{key} must be at least {bounds.at_least}, not {value}.")
    if bounds.above is not None and not value > bounds.above:
        raise UserError(f"{key} must be more than {bounds.above}, not {value}.")
    if bounds.at_most is not None and not value <= bounds.at_most:
        raise UserError(f"{key} must be at most {bounds.at_most}, not {value}.")


def _check_plan(flat: dict[str, Any]) -> None:
    if flat["plan.replan_every"] > flat["plan.horizon"]:
        raise UserError("plan.replan_every must not exceed plan.horizon: a plan ends there.")
    if flat["distill.weight"] and flat["plan.candidates"] == 1:
        raise UserError("distill.weight needs candidates to distil: set plan.candidates.")


def _check_mpdp(flat: dict[str, Any]) -> None:
    if flat["behavior.gradient"] != "pathwise":
        raise UserError(
            "behavior.improvement=mpdp climbs the model: it needs behavior.gradient=pathwise."
        )
    plans = flat["plan.candidates"] > 1
    if plans and flat["mpdp.policies"] == "per_step" and flat["plan.imagine_fraction"]:
        raise UserError(
            "mpdp.policies=per_step makes rollouts of its own, in which nothing is planned: "
            "set plan.imagine_fraction=0."
        )
    if plans and flat["plan.imagine_fraction"] == 1:
        raise UserError(
            "behavior.improvement=mpdp values the policy, in rows that are not planned: "
            "plan.imagine_fraction must be less than 1."
        )
    if flat["mpdp.horizon"] > flat["behavior.horizon"]:
        raise UserError(
            "mpdp.horizon must not exceed behavior.horizon: rollouts are improved in windows."
        )
    keys = ("behavior.entropy", "mpdp.entropy_fraction", "behavior.discount_horizon")
    if prod(flat[key] for key in keys) >= 1:
        raise UserError(
            f"{' * '.join(keys)} must be less than 1 with behavior.improvement=mpdp: entropy is "
            "paid in units of the scale of returns, which would grow with what is paid."
        )


def _check_ensemble(flat: dict[str, Any]) -> None:
    ensemble = "world." + uncertainty_members_field(flat["world.uncertainty"])
    mpdp = flat["behavior.improvement"] == "mpdp"
    asked = mpdp and (flat["mpdp.beta"] or flat["mpdp.adaptive_horizon"])
    if flat[ensemble] == 1 and (
        flat["plan.candidates"] > 1 or flat["world.uncertainty"] == "kl_rest" or asked
    ):
        raise UserError(f"{ensemble} must be at least 2: one alone cannot disagree.")
