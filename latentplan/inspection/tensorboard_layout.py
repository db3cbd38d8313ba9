"""The layout of a run in TensorBoard: charts to check first, help, and hyperparameters."""

from __future__ import annotations

from dataclasses import asdict

from latentplan.config.loading import flatten, to_yaml
from latentplan.config.schema import Config
from latentplan.inspection.visualizations import CAPTIONS
from latentplan.runs.logger import Logger

FIRST_PAGE = {  # {page: {chart title: metrics}}
    "What to check first": {
        "1 Return: training, policy, planner": (
            "episode/score",
            "episode/eval_score",
            "episode/sample_score",
            "episode/planner_score",
        ),
        "2 Does the model predict observations?": ("train/loss/image", "train/loss/vector"),
        "3 Does the model predict rewards?": ("train/loss/rew",),
        "4 Prior against posterior, nats": ("train/model/kl", "train/model/posterior_entropy"),
        "5 Uncertainty of replayed rows": (
            "train/model/uncertainty",
            "train/model/uncertainty_high",
        ),
        "6 Is the policy still random? Standard deviation": ("train/actor/std",),
        "7 Critic: value against return": ("train/critic/value", "train/critic/return"),
        "8 Share of uncertainty in the scores of plans": (
            "train/plan/explore_bonus_share",
            "train/plan/imagine_bonus_share",
        ),
        "9 Gain of the chosen candidate": (
            "train/plan/explore_gain",
            "train/plan/imagine_gain",
        ),
        "10 Speed: updates per second": ("fps/updates",),
    }
}
METRIC_GROUPS = {
    "episode": "Undiscounted returns of whole episodes. `score` is from training episodes. "
    "`eval_score` is from the policy's mean action, `sample_score` from samples of it, and "
    "`planner_score` from the planner, all on seeds that training never uses. `planner_gap` is "
    "planner - policy.",
    "train/loss": "The weighted terms of the loss. They are finite, because a batch with a loss "
    "that is not is skipped (`train/skipped_batches` counts them). `image` and `vector` fall "
    "first, then `rew`.",
    "train/model": "The world model on replayed rows: KL divergence between the posterior and the "
    "priors, disagreement of the ensemble (`uncertainty`), and its 95th percentile "
    "(`uncertainty_high`).",
    "train/plan": "Plans in the environment (`explore_`) and in imagination (`imagine_`). "
    "`_spread` is how much a term of the score differs between candidates, and `_bonus_share` is "
    "the share of uncertainty in these differences. `_gain` is the return of the chosen candidate "
    "minus the mean over candidates, in units of the return scale. `_invalid` counts the "
    "candidates without a finite score, per update. `distance` is the distance from the policy "
    "to the chosen action in nats; it is 0 for a sample of the policy.",
    "train/mpdp": "The multi-step objective: steps before the value is used (`horizon`), the share "
    "of the penalty, and the entropy of each step's policy.",
    "train/actor": "Entropy (nats) and standard deviation of the policy, and the temperature of "
    "the entropy.",
    "train/critic": "Values and returns of imagined states, and the scale of the returns. The "
    "values are those of the policy, or of the planner where it acts in imagination. With MPDP "
    "they are always those of the policy, and include its entropy.",
    "imagination": "Means over imagined rollouts, and the films. Where a planner acts in the "
    "rollouts, the rewards are those of the planner. Do not compare ablations by these metrics.",
    "calibration": "Rank correlation of uncertainty and error k steps ahead (`latentplan "
    "calibrate`).",
    "env": "`faults` counts the faults of training environments since the run began. Each has cut "
    "an episode. `eval_faults` are those of one evaluation.",
    "fps": "Frames and updates per second of wall-clock time, and the share of each part in it.",
    "memory": "GiB of this process and its workers. `shared` is mostly the file cache of the "
    "replay, and `disk` is the size of the run folder.",
    "replay": "Number of rows that can be sampled.",
}
# TensorBoard shows the first five, in alphabetical order, until others are selected. These describe
# a run, so their names begin with a number.
FIRST_HYPERPARAMETERS = ("task", "seed", "size", "obs", "ablation")
HYPERPARAMETERS = (
    *("env.repeat", "train.ratio"),
    *("behavior.improvement", "behavior.gradient", "behavior.entropy", "behavior.horizon"),
    *("distill.weight", "mpdp.beta", "mpdp.horizon", "mpdp.policies"),
    *("plan.candidates", "plan.explore_rate", "plan.horizon", "plan.imagine_rate"),
    *("plan.imagine_fraction", "plan.replan_every", "world.members", "world.uncertainty"),
)
SCORES = (
    "episode/eval_score",
    "episode/sample_score",
    "episode/planner_score",
    "episode/score",
)


def set_up_tensorboard(logger: Logger, config: Config) -> None:
    """Write the configuration, help, layout and hyperparameters. This is done once per run."""
    logger.text("config", f"```yaml\n{to_yaml(config)}```", 0)
    logger.text("help", help_text(), 0)
    logger.layout(FIRST_PAGE)
    logger.hyperparameters(hyperparameters(config), SCORES)


def help_text() -> str:
    """A Markdown table that explains the metrics and films."""
    rows = [f"| `{name}/` | {meaning} |" for name, meaning in METRIC_GROUPS.items()]
    films = [f"| `imagination/{name}` | {meaning} |" for name, meaning in CAPTIONS.items()]
    head = "Start with the CUSTOM SCALARS tab. The horizontal axis is environment frames.\n"
    return "\n".join([head, "| name | meaning |", "|---|---|", *rows, *films])


def hyperparameters(config: Config) -> dict[str, str | float]:
    """The values of the configuration keys, by their names in TensorBoard."""
    flat = flatten(asdict(config))
    first = {f"{i + 1} {key}": flat[key] for i, key in enumerate(FIRST_HYPERPARAMETERS)}
    chosen = {key: flat[key] for key in HYPERPARAMETERS}
    return {**first, **{key: "null" if x is None else x for key, x in chosen.items()}}
