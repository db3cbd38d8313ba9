"""What the values of the configuration may be, alone and together."""

from __future__ import annotations

from math import prod

from latentplan.schema import judged_by
from latentplan.types import UserError

CHOICES = {
    "obs": ("pixels", "state", "both"),
    "env.renderer": ("auto", "egl", "osmesa", "glfw"),
    "env.render_quality": ("auto", "exact", "fast"),
    "world.member_per": ("rollout", "step"),
    "world.uncertainty": ("jsd", "std", "kl_rest", "probes"),
    "world.coder": ("strided", "patch"),
    "world.norm": ("rms", "layer"),
    "behavior.improvement": ("dreamer", "mpdp"),
    "behavior.gradient": ("reinforce", "pathwise"),
    "world.representation": ("decoder", "barlow"),
    "train.compile": ("auto", "off", "cell", "full"),
    "mpdp.policies": ("per_step", "shared"),
    "train.precision": ("auto", "float32", "bfloat16"),
}

MINIMA = {  # where it is more than 0
    "steps": 1,
    "env.repeat": 1,
    "env.image_size": 16,
    "env.episode_frames": 1,
    "env.count": 1,
    "replay.capacity": 1,
    **{
        f"world.{name}": 1
        for name in (
            *("deter", "stoch", "hidden", "blocks", "units", "depth"),
            *("members", "member_hidden", "probe_members", "probe_units"),
        )
    },
    "world.classes": 2,
    "world.bins": 3,
    "behavior.horizon": 1,
    "behavior.discount_horizon": 1,
    "behavior.units": 1,
    "behavior.bins": 3,
    "mpdp.horizon": 1,
    "plan.candidates": 1,
    "plan.horizon": 1,
    "train.batch": 1,
    "train.length": 2,
    "eval.episodes": 1,
    "log.every": 1,
    "log.inspect_context": 1,
}
MAXIMA = {"seed": 2**64 - 1}  # what torch's generators take
SIGNED = ("plan.explore_rate", "plan.imagine_rate", "plan.act_rate", "behavior.target_entropy")
SHARES = (
    *("world.unimix", "world.bootstrap", "world.decode_fraction"),
    *("behavior.lam", "behavior.slow_rate", "behavior.scale_rate", "behavior.starts_fraction"),
    *("plan.imagine_share", "optim.beta1", "optim.beta2"),
)
POSITIVE = (
    *("world.bootstrap", "world.decode_fraction", "behavior.starts_fraction", "train.ratio"),
    *("behavior.std_min", "env.timeout", "behavior.entropy", "mpdp.threshold"),
    "mpdp.entropy_share",
    *("optim.world_lr", "optim.actor_lr", "optim.critic_lr", "optim.temperature_lr", "optim.clip"),
    "distill.temperature",
)


def check(flat: dict[str, object]) -> None:
    """Refuse values that no run could use, before anything is built.

    Raises:
        UserError: naming the key.
    """
    for key, choices in CHOICES.items():
        if flat[key] not in choices:
            raise UserError(f"{key} must be one of {', '.join(choices)}, not {flat[key]!r}.")
    for key, minimum in MINIMA.items():
        if flat[key] < minimum:
            raise UserError(f"{key} must be at least {minimum}, not {flat[key]}.")
    for key, maximum in MAXIMA.items():
        if flat[key] > maximum:
            raise UserError(f"{key} must be at most {maximum}, not {flat[key]}.")
    for key, value in flat.items():
        if isinstance(value, int | float) and value < 0 and key not in SIGNED:
            raise UserError(f"{key} must be at least 0, not {value}.")
    for key in POSITIVE:
        if not flat[key] > 0:
            raise UserError(f"{key} must be positive, not {flat[key]}.")
    for key in SHARES:
        if not 0 <= flat[key] <= 1:
            raise UserError(f"{key} is a share, from 0 to 1, not {flat[key]}.")
    if flat["behavior.std_min"] >= flat["behavior.std_max"]:
        raise UserError("behavior.std_min must be less than behavior.std_max.")
    for key in ("world.bins", "behavior.bins"):
        if flat[key] % 2 == 0:
            raise UserError(f"{key} must be odd, so that one bin is zero, not {flat[key]}.")
    if flat["world.deter"] % flat["world.blocks"]:
        raise UserError("world.blocks must divide world.deter.")
    if flat["train.length"] > flat["replay.capacity"] // flat["env.count"]:
        raise UserError("replay.capacity must hold train.length rows of each environment.")
    _check_plan(flat)
    if flat["behavior.improvement"] == "mpdp":
        _check_mpdp(flat)
    _check_ensemble(flat)


def _check_plan(flat: dict[str, object]) -> None:
    if flat["plan.replan_every"] > flat["plan.horizon"]:
        raise UserError("plan.replan_every must not exceed plan.horizon: a plan ends there.")
    if flat["distill.weight"] and flat["plan.candidates"] == 1:
        raise UserError("distill.weight needs candidates to distil: set plan.candidates.")


def _check_mpdp(flat: dict[str, object]) -> None:
    if flat["behavior.gradient"] != "pathwise":
        raise UserError(
            "behavior.improvement=mpdp climbs the model: it needs behavior.gradient=pathwise."
        )
    plans = flat["plan.candidates"] > 1
    if plans and flat["mpdp.policies"] == "per_step" and flat["plan.imagine_share"]:
        raise UserError(
            "mpdp.policies=per_step makes rollouts of its own, in which nothing is planned: "
            "set plan.imagine_share=0."
        )
    if plans and flat["plan.imagine_share"] == 1:
        raise UserError(
            "behavior.improvement=mpdp values the policy, in rows that are not planned: "
            "plan.imagine_share must be less than 1."
        )
    if flat["mpdp.horizon"] > flat["behavior.horizon"]:
        raise UserError(
            "mpdp.horizon must not exceed behavior.horizon: rollouts are improved in windows."
        )
    keys = ("behavior.entropy", "mpdp.entropy_share", "behavior.discount_horizon")
    if prod(flat[key] for key in keys) >= 1:
        raise UserError(
            f"{' * '.join(keys)} must be less than 1 with behavior.improvement=mpdp: entropy is "
            "paid in units of the scale of returns, which would grow with what is paid."
        )


def _check_ensemble(flat: dict[str, object]) -> None:
    ensemble = "world." + judged_by(flat["world.uncertainty"])
    mpdp = flat["behavior.improvement"] == "mpdp"
    asked = mpdp and (flat["mpdp.beta"] or flat["mpdp.adaptive_horizon"])
    if flat[ensemble] == 1 and (
        flat["plan.candidates"] > 1 or flat["world.uncertainty"] == "kl_rest" or asked
    ):
        raise UserError(f"{ensemble} must be at least 2: one alone cannot disagree.")
