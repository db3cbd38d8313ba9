"""Verdicts on the measured parts of an agent: what a number means, and what to try.

``model_quality.py`` and ``behavior_quality.py`` measure the numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from latentplan.inspection.model_quality import AHEAD

# A verdict is "look here" beyond these values.
UNEXPLAINED = 0.5  # unexplained variance: half of what varies is not predicted
CORRELATION = 0.5  # of values and returns: less than a quarter of the variance is explained
BIAS = 0.5  # of values, in return scales: as large as half of the range of usual returns
SPREAD = 0.25  # of several critics, in return scales: a plan seldom gains as much
WIDTH = 0.8  # of the policy, from 0 to 1: it is 0.88 before the first update
BEHIND = 0.05  # difference of scores, as a fraction of the larger: what users would care about
ERRORS = 2.0  # standard errors that a difference must exceed, so that it is hardly chance
RANKS = 0.2  # rank correlation of uncertainty and error: it is 0 for an unrelated number

OK, LOOK, OUT = "ok", "look here", "left out"
WORST = 3  # entries of an observation that a sentence names
_AHEAD = f" {AHEAD} decisions ahead"
Verdict = tuple[str, str]  # one of OK, LOOK and OUT, and a sentence


def verdicts(measured: dict[str, Any]) -> dict[str, dict[str, str]]:
    """The verdict and its sentence for every part.

    Args:
        measured: the results by part, with ``scores``, those of every way of acting.
    """
    scores = {mode: x["returns"] for mode, x in measured["scores"].items()}
    judged = {
        "model": judge_model(measured["model"]),
        "reward": judge_reward(measured["reward"]),
        "critic": judge_critic(measured["critic"]),
        "actor": judge_actor(measured["actor"], scores),
        "planner": judge_planner(measured["planner"], scores),
        "uncertainty": judge_uncertainty(measured["uncertainty"]),
    }
    return {part: {"verdict": x, "sentence": sentence} for part, (x, sentence) in judged.items()}


def judge_model(model: dict[str, Any]) -> Verdict:
    """Judge the result of :func:`measure_model`."""
    for when, verb, then in (("now", "reconstruct", ""), ("ahead", "predict", _AHEAD)):
        entries = model[when]
        bad = sorted((k for k, x in entries.items() if x > UNEXPLAINED), key=lambda k: -entries[k])
        if bad:
            named = ", ".join(f"`{k}` {entries[k]:.2f}" for k in bad[:WORST])
            return LOOK, (
                f"The model does not {verb} {len(bad)} of {len(entries)} observed entries{then} "
                f"(unexplained variance, the worst first: {named}): train longer, raise "
                "train.ratio, or check that the observation has the information."
            )
    if not model["now"]:
        return LOOK, "No entry of the observation varies: check that the environment reacts."
    worst = max(model["ahead"], key=lambda k: float(model["ahead"][k]))
    return OK, (
        f"The model predicts all {len(model['now'])} observed entries; the worst one{_AHEAD} is "
        f"`{worst}` (unexplained variance {model['ahead'][worst]:.2f})."
    )


def judge_reward(reward: dict[str, Any]) -> Verdict:
    """Judge the result of :func:`measure_reward`."""
    now, ahead, rewarded = (reward[k] for k in ("now", "ahead", "rewarded"))
    if not rewarded:
        return LOOK, (
            "No reward was seen, so nothing can be learned from these episodes: train longer, "
            "explore more (plan.candidates=4, or a larger behavior.entropy), or reward earlier "
            "progress."
        )
    if now is None:
        return LOOK, "The reward is always the same, so no action is better than another."
    found = f"{now:.2f} of the reward's variance is unexplained"
    if ahead is not None:
        found += f", and {ahead:.2f} after {AHEAD} predicted decisions"
    if max(now, ahead or 0.0) > UNEXPLAINED:
        return LOOK, (
            f"The model does not predict the reward ({found}; {rewarded:.1%} of the rows have "
            "one): train longer, raise train.ratio, or check that the observation shows what is "
            "rewarded."
        )
    return OK, f"The model predicts the reward: {found}."


def judge_critic(critic: dict[str, Any]) -> Verdict:
    """Judge the result of :func:`measure_critic`."""
    correlation, bias, spread = (critic[k] for k in ("correlation", "bias", "spread"))
    found = f"mean value {critic['value']:.3g}, mean return {critic['return']:.3g}"
    if correlation is None:
        return LOOK, (
            f"The values cannot be compared with the returns, because one of them is constant "
            f"({found}): train until the agent meets a reward."
        )
    if correlation < CORRELATION:
        return LOOK, (
            f"The critic does not tell good states from bad ones (correlation with the returns "
            f"{correlation:.2f}; {found}): train longer, or raise behavior.replay_scale."
        )
    if abs(bias) > BIAS:
        word = "promises too much" if bias > 0 else "expects too little"
        return LOOK, (
            f"The critic {word} (by {abs(bias):.2f} return scales; {found}): check the reward's "
            "prediction, raise behavior.replay_scale, or train longer."
        )
    if spread is not None and spread > SPREAD:
        return LOOK, (
            f"The critics disagree by {spread:.2f} return scales, which is more than most actions "
            "differ by: train longer, or raise behavior.slow_rate."
        )
    return OK, (
        f"The values follow the returns (correlation {correlation:.2f}, bias {bias:+.2f} return "
        f"scales; {found}), and {critic['own']:.0%} of these returns are the critic's own estimate."
    )


def judge_actor(actor: dict[str, Any], scores: dict[str, Sequence[float]]) -> Verdict:
    """Judge the result of :func:`measure_actor`.

    Args:
        scores: the returns of the same episodes, by way of acting.
    """
    mean, sample = (float(np.mean(scores[mode])) for mode in ("mean", "sample"))
    found = f"standard deviation {actor['std']:.2f}, score {mean:.4g}, of samples {sample:.4g}"
    if exceeds(scores["sample"], scores["mean"]):
        return LOOK, (
            f"The policy's mean action is worse than its samples ({found}), so the mean of a wide "
            "policy misleads: act with --policy sample, or lower behavior.entropy."
        )
    if actor["width"] > WIDTH:
        return LOOK, (
            f"The policy is about as wide as before training ({found}), so it prefers no action: "
            "see reward and critic first, train longer, or lower behavior.entropy."
        )
    return OK, f"The mean action is as good as samples of the policy or better ({found})."


def judge_planner(planner: dict[str, Any], scores: dict[str, Sequence[float]]) -> Verdict:
    """Judge the result of :func:`measure_planner`, and ``trained``: the run has a planner.

    Args:
        scores: as in :func:`judge_actor`.
    """
    best = max(("mean", "sample"), key=lambda mode: float(np.mean(scores[mode])))
    mine, other = float(np.mean(scores["planner"])), float(np.mean(scores[best]))
    ratio = f", {mine / other:.2f} times as much" if mine > 0 and other > 0 else ""
    gain, error, promised = (
        float("nan") if planner[k] is None else planner[k]
        for k in ("gain", "gain_error", "in_sample_gain")
    )
    found = (
        f"score {mine:.4g} against the policy's {other:.4g}{ratio}; gain in the model {gain:.2g} "
        f"+- {error:.1g} return scales in fresh draws, {promised:.2g} in the plan's own"
    )
    real = gain > ERRORS * error
    if exceeds(scores[best], scores["planner"]):
        cause = (
            "its actions are better in the model only, so look at the model and the critic"
            if real
            else "its choices are luck in the model: try plan.search=cross_entropy, or do not plan"
        )
        return LOOK, f"The planner acts worse than the policy ({found}): {cause}."
    if exceeds(scores["planner"], scores[best]):
        return LOOK, (
            f"The planner acts better than the policy ({found}), so the actor lags behind what the "
            "model knows: train longer, or use the plans in training (plan.candidates, "
            "distill.weight)."
        )
    if not real and not planner["trained"]:
        return OK, (
            f"This run was trained without a planner, and a planner finds no better action than "
            f"the policy's mean ({found})."
        )
    if not real:
        return LOOK, (
            f"The planner finds no better action than the policy's mean ({found}): planning adds "
            "nothing here, unless model and critic become better."
        )
    return OK, f"The planner finds better actions in the model, and loses no score ({found})."


def judge_uncertainty(uncertainty: dict[str, Any]) -> Verdict:
    """Judge the result of :func:`measure_uncertainty`, and ``used``: training depends on it."""
    if uncertainty["left_out"]:
        return OUT, uncertainty["left_out"]
    ranks = uncertainty["rank_correlation"]
    found = ", ".join(
        f"{'unknown' if rho is None else format(rho, '.2f')} after {k} decision{'s'[: k != '1']}"
        for k, rho in ranks.items()
    )
    if any(rho is None or rho < RANKS for rho in ranks.values()):
        fact = f"The uncertainty does not rank the model's errors (rank correlation {found})"
        if not uncertainty["used"]:
            return OK, f"{fact}, but nothing in this run uses it."
        return LOOK, (
            f"{fact}, so bonuses and penalties for it are noise: raise world.members, try another "
            "world.uncertainty, or set plan.explore_rate=0."
        )
    return OK, f"The uncertainty ranks the model's errors (rank correlation {found})."


def exceeds(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether returns ``a`` are higher than ``b`` of the same episodes, by more than chance.

    The mean difference must exceed BEHIND of the larger mean and ERRORS standard errors.
    """
    difference = np.subtract(a, b)
    error = difference.std() / max(len(difference) - 1, 1) ** 0.5
    larger = max(abs(np.mean(a)), abs(np.mean(b)))
    return bool(difference.mean() > max(BEHIND * larger, ERRORS * error))
