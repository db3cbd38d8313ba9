"""How a run presents itself in TensorBoard: what to look at first, and what the names mean."""

from __future__ import annotations

from dataclasses import asdict

from latentplan.config.loading import flatten, to_yaml
from latentplan.config.schema import Config
from latentplan.inspection.visualizations import CAPTIONS
from latentplan.runs.logger import Logger

FIRST = {
    "What to check first": {
        "1 Return: training, policy, planner": (
            "episode/score",
            "episode/eval_score",
            "episode/planner_score",
        ),
        "2 Does the model predict observations?": ("train/loss/image", "train/loss/vector"),
        "3 Does it predict rewards?": ("train/loss/rew",),
        "4 Prior against posterior, nats": ("train/model/kl", "train/model/posterior_entropy"),
        "5 Uncertainty on replayed rows": (
            "train/model/uncertainty",
            "train/model/uncertainty_high",
        ),
        "6 Is the policy still random? Its deviation": ("train/actor/std",),
        "7 Critic: value against return": ("train/critic/value", "train/critic/return"),
        "8 What uncertainty decides in plans": (
            "train/plan/explore_bonus_share",
            "train/plan/imagine_bonus_share",
        ),
        "9 What choosing gains": ("train/plan/explore_gain", "train/plan/imagine_gain"),
        "10 Speed: updates per second": ("fps/updates",),
    }
}
GROUPS = {
    "episode": "Whole episodes, undiscounted. `score` is of training episodes; `eval_score` of the "
    "policy's mean action and `planner_score` of the planner on seeds training never uses; "
    "`planner_gap` is planner - policy.",
    "train/loss": "The terms of the loss, weighted as they are added up. They stay finite; `image` "
    "and `vector` fall first, then `rew`.",
    "train/model": "The world model on replayed rows: KL of posterior and priors, disagreement of "
    "the ensemble (`uncertainty`, and its 95th percentile).",
    "train/plan": "Plans in the environment (`explore_`) and in imagination (`imagine_`): what "
    "tells candidates apart (`_spread`), the share of uncertainty in it (`_bonus_share`), what "
    "choosing gains in return (`_gain`, in return scales), candidates without a finite score "
    "(`_invalid`, per update). `distance`: nats from policy to choice, 0 for a mere sample.",
    "train/mpdp": "The multi-step objective: steps taken before the value stands in (`horizon`), "
    "share of the penalty, entropy of each step's policy.",
    "train/actor": "Entropy (nats), standard deviation, and the entropy's temperature.",
    "train/critic": "Values and returns of imagined states, and the scale that returns are "
    "measured in. Values are those of what acts there, the planner's where it plans; with MPDP "
    "the policy's own, its entropy included.",
    "imagination": "Means over imagined rollouts, and the films. Where a planner acts in rollouts "
    "its rewards are in them: do not compare ablations by these.",
    "calibration": "Rank correlation of uncertainty and error k steps ahead (`latentplan "
    "calibrate`).",
    "fps": "Frames and updates per second of wall clock, and the share of each part in it.",
    "memory": "GiB of this process and its workers; `shared` is mostly the replay's file cache, "
    "`disk` the run folder.",
    "replay": "Rows that can be sampled.",
}
TELLING = (  # TensorBoard shows the first five, in alphabetical order, until others are ticked
    *("ablation", "obs", "seed", "size", "task", "env.repeat", "train.ratio"),
    *("behavior.improvement", "behavior.gradient", "behavior.entropy", "behavior.horizon"),
    *("distill.weight", "mpdp.beta", "mpdp.horizon", "mpdp.policies"),
    *("plan.candidates", "plan.explore_rate", "plan.horizon", "plan.imagine_rate"),
    *("plan.imagine_fraction", "plan.replan_every", "world.members", "world.uncertainty"),
)
SCORES = ("episode/eval_score", "episode/planner_score", "episode/score")


def present(logger: Logger, config: Config) -> None:
    """Write configuration, help, layout and hyper-parameters, once per run."""
    logger.text("config", f"```yaml\n{to_yaml(config)}```", 0)
    logger.text("help", guide(), 0)
    logger.layout(FIRST)
    logger.hyperparameters(telling(config), SCORES)


def guide() -> str:
    """What scalars and films mean, as Markdown."""
    rows = [f"| `{name}/` | {meaning} |" for name, meaning in GROUPS.items()]
    films = [f"| `imagination/{name}` | {meaning} |" for name, meaning in CAPTIONS.items()]
    head = "Start with the CUSTOM SCALARS tab. The horizontal axis is environment frames.\n"
    return "\n".join([head, "| name | meaning |", "|---|---|", *rows, *films])


def telling(config: Config) -> dict[str, str | float]:
    """The keys that runs are told apart by."""
    flat = flatten(asdict(config))
    return {key: flat[key] for key in TELLING}
