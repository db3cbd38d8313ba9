"""The schema of the configuration: every key with its type, default, meaning, bounds and choices.

``latentplan config --explain KEY`` prints an entry, and ``docs/configuration.md`` is generated from
all entries. Conditions that involve several keys are in ``config/validation.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

SINKS = ("wandb", "mlflow")  # what log.sinks may name
ENTROPY_OF_GRADIENT = {"pathwise": 0.001, "reinforce": 0.004}  # behavior.entropy=null


class Bounds(NamedTuple):
    """The values that a key accepts. Numbers must not be negative unless ``at_least`` is."""

    choices: tuple[str, ...] = ()  # the accepted texts; empty: any text
    at_least: float = 0  # inclusive lower bound
    above: float | None = None  # exclusive lower bound
    at_most: float | None = None  # inclusive upper bound
    path: bool = False  # a path, in which a leading ~ is the home folder


def setting(default: Any, meaning: str, **bounds: Any) -> Any:
    """A field of the schema.

    Args:
        default: used if no preset, file or override sets the key.
        meaning: one sentence, with the unit.
        bounds: fields of :class:`Bounds`.
    """
    return field(default=default, metadata={"meaning": meaning, "bounds": Bounds(**bounds)})


@dataclass(frozen=True)
class EnvConfig:
    """The environments that experience is collected from."""

    repeat: int = setting(2, "Environment frames per decision (action repeat).", at_least=1)
    image_size: int = setting(64, "Pixels per side of an image; divisible by 16.", at_least=16)
    episode_frames: int = setting(1000, "Frames after which an episode is truncated.", at_least=1)
    num_envs: int = setting(1, "Number of training environments.", at_least=1)
    workers: bool = setting(
        True, "Run each environment in its own process; false: all in the training process."
    )
    timeout: float = setting(
        180.0, "Seconds that one environment step may take.", above=0, at_most=1e7
    )
    max_faults: int = setting(
        10, "Faults of environments within 100 episodes that stop the run.", at_least=1
    )
    renderer: str = setting(
        "auto",
        "OpenGL backend that draws images; auto takes the first that works.",
        choices=("auto", "egl", "osmesa", "glfw"),
    )
    render_quality: str = setting(
        "auto",
        "exact: dm_control's images; fast: no shadows and no multisampling; auto: exact on a GPU, "
        "fast on a CPU.",
        choices=("auto", "exact", "fast"),
    )
    module: str = setting(
        "", "Python file or module that registers Gymnasium environments.", path=True
    )
    kwargs: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "meaning": "Arguments of a gym: environment, by their names: env.kwargs.NAME=value.",
            "bounds": Bounds(),
        },
    )
    success: str = setting(
        "info",
        "What counts as success in evaluation; info: what the environment says; reward: a "
        "decision with a positive reward.",
        choices=("info", "reward"),
    )
    camera: str = setting(
        "", "Name or number of the camera of a dm_control task; empty: the usual one."
    )


@dataclass(frozen=True)
class ReplayConfig:
    """The replay buffer."""

    capacity: int = setting(
        500_000, "Rows (decisions) that the replay holds, over all environments.", at_least=1
    )


def uncertainty_members_field(uncertainty: str) -> str:
    """The field of `WorldConfig` that sets the ensemble size for this uncertainty measure."""
    return "probe_members" if uncertainty == "probes" else "members"


@dataclass(frozen=True)
class WorldConfig:
    """The world model: an RSSM with an ensemble of prior heads."""

    deter: int = setting(2048, "Size D of the deterministic recurrent state.", at_least=1)
    stoch: int = setting(32, "Number S of categorical groups in the stochastic state.", at_least=1)
    classes: int = setting(16, "Classes C of each categorical group.", at_least=2)
    hidden: int = setting(256, "Width inside the recurrent core and the posterior.", at_least=1)
    blocks: int = setting(8, "Blocks of the block-diagonal recurrent core.", at_least=1)
    units: int = setting(
        256, "Width of the MLPs of reward head, continue head and vector coders.", at_least=1
    )
    layers: int = setting(1, "Hidden layers of the reward and continue heads.")
    vector_layers: int = setting(
        3, "Layers of the vector encoder, and hidden layers of the vector decoder."
    )
    depth: int = setting(
        16, "Channels after the first halving of an image; each halving doubles them.", at_least=1
    )
    members: int = setting(5, "Number M of ensemble members (prior heads).", at_least=1)
    member_hidden: int = setting(256, "Width of each prior head.", at_least=1)
    bootstrap: float = setting(
        0.8, "Fraction of episodes that each ensemble member learns from.", above=0, at_most=1
    )
    member_per: str = setting(
        "rollout",
        "How long the same ensemble member predicts an imagined rollout: the whole rollout, or one "
        "step.",
        choices=("rollout", "step"),
    )
    uncertainty: str = setting(
        "jsd",
        "How the disagreement of the ensemble is measured.",
        choices=("jsd", "std", "kl_rest", "probes"),
    )
    probe_members: int = setting(8, "Number of probe networks, for uncertainty=probes.", at_least=1)
    probe_units: int = setting(512, "Width of the probes' two hidden layers.", at_least=1)
    unimix: float = setting(
        0.01, "Fraction of the uniform distribution mixed into every categorical.", at_most=1
    )
    anneal_updates: int = setting(
        0,
        "Updates over which latent states change linearly from class probabilities to samples; "
        "0: samples from the start.",
    )
    bins: int = setting(255, "Bins of the two-hot reward; odd.", at_least=3)
    free_nats: float = setting(
        1.0,
        "Below this KL divergence, in nats, the posterior and the core get no gradient from it.",
    )
    representation: str = setting(
        "decoder",
        "The training signal of the latent state: reconstruction, or Barlow Twins without a "
        "decoder.",
        choices=("decoder", "barlow"),
    )
    barlow_scale: float = setting(0.05, "Weight of the Barlow Twins loss.")
    recon_scale: float = setting(1.0, "Weight of the squared errors of images and vectors.")
    dyn_scale: float = setting(1.0, "Weight of KL[sg posterior || prior].")
    rep_scale: float = setting(0.1, "Weight of KL[posterior || sg prior].")
    coder: str = setting(
        "strided",
        "How the image encoder and decoder change the resolution by the first factor of 4: strided "
        "convolutions, or patches of 4 x 4 pixels.",
        choices=("strided", "patch"),
    )
    norm: str = setting(
        "rms",
        "Normalization layers: RMSNorm (published) or LayerNorm; ensembles always use LayerNorm.",
        choices=("rms", "layer"),
    )
    decode_fraction: float = setting(
        1.0, "Fraction of the batch's rows that are reconstructed.", above=0, at_most=1
    )

    @property
    def uncertainty_members(self) -> int:
        """Members of the ensemble whose disagreement is the uncertainty."""
        return int(getattr(self, uncertainty_members_field(self.uncertainty)))


@dataclass(frozen=True)
class BehaviorConfig:
    """Actor and critic, which learn from imagined rollouts."""

    improvement: str = setting(
        "dreamer",
        "Objective of the actor: Dreamer's, or MPDP's multi-step soft return.",
        choices=("dreamer", "mpdp"),
    )
    gradient: str = setting(
        "reinforce",
        "Gradient estimator of the actor: score function, or pathwise through the model; auto: "
        "pathwise for continuous actions, and the score function for discrete ones.",
        choices=("reinforce", "pathwise", "auto"),
    )
    horizon: int = setting(15, "Imagined steps H.", at_least=1)
    discount_horizon: float = setting(
        333.0,
        "Horizon of the discount, in decisions: discount = 1 - 1/discount_horizon.",
        at_least=1,
    )
    lam: float = setting(0.95, "Lambda of the lambda-returns.", at_most=1)
    entropy: float | None = setting(
        3e-4,
        "Bonus per nat of policy entropy, in units of the return scale; MPDP multiplies it by "
        "mpdp.entropy_fraction; null: 0.001 with the pathwise gradient, and 0.004 with the score "
        "function, whose noise narrows a policy before it has met a reward.",
        above=0,
    )
    target_entropy: float | None = setting(
        None,
        "Target of the policy's entropy, to which the bonus is tuned: in nats per dimension of "
        "continuous actions, or as a fraction of the largest entropy of discrete ones; null: the "
        "bonus is fixed.",
        at_least=float("-inf"),
    )
    units: int = setting(256, "Width of actor and critic.", at_least=1)
    layers: int = setting(3, "Hidden layers of actor and critic.")
    explore: str = setting(
        "sample",
        "What acts in the training environments without a planner: samples of the policy, or its "
        "mean.",
        choices=("sample", "mean"),
    )
    explore_noise: float = setting(
        0.0,
        "Noise of the actions of the policy's mean and of the planner in the training "
        "environments: the standard deviation of normal noise, or the probability that a discrete "
        "action is replaced by a random one.",
    )
    unimix: float = setting(
        0.01, "Uniform fraction of the probabilities of discrete actions.", above=0, at_most=1
    )
    std_min: float = setting(0.1, "Smallest standard deviation of an action in [-1, 1].", above=0)
    std_max: float = setting(1.0, "Largest standard deviation of an action in [-1, 1].")
    bins: int = setting(255, "Bins of the two-hot value; odd.", at_least=3)
    critics: int = setting(
        1,
        "Number of critics; plans use their mean, and targets the smallest of their values.",
        at_least=1,
    )
    slow_rate: float = setting(
        0.02, "Rate, per update, at which the slow critic follows the critic.", at_most=1
    )
    slow_scale: float = setting(1.0, "Weight of the critic's loss towards the slow critic.")
    replay_scale: float = setting(0.3, "Weight of the value loss on replayed rows.")
    scale_rate: float = setting(
        0.01, "Rate, per update, of the running scales of returns and uncertainty.", at_most=1
    )
    caution: float = setting(
        0.0,
        "Imagined steps weigh 1 / (1 + caution * u), multiplied along the rollout, where u is the "
        "uncertainty in units of its scale; 0: all weigh alike.",
    )
    starts_fraction: float = setting(
        1.0, "Fraction of the batch's rows that imagination starts from.", above=0, at_most=1
    )

    @property
    def discount(self) -> float:
        """Discount per decision."""
        return 1 - 1 / self.discount_horizon

    @property
    def entropy_bonus(self) -> float:
        """``entropy``, or the value that null stands for. ``gradient`` must not be ``auto``."""
        return ENTROPY_OF_GRADIENT[self.gradient] if self.entropy is None else self.entropy


@dataclass(frozen=True)
class PlanConfig:
    """UP-MPC, the planner in the environment and in imagination."""

    candidates: int = setting(
        1, "Number K of candidate rollouts of the policy; 1: no planner.", at_least=1
    )
    search: str = setting(
        "samples",
        "How candidates are made: samples of the policy that are followed (COPlanner), or a "
        "cross-entropy search for the first action, whose candidates then follow the policy's mean "
        "through expected states.",
        choices=("samples", "cross_entropy"),
    )
    rounds: int = setting(3, "Rounds of the cross-entropy search.", at_least=1)
    elites: int = setting(
        6, "Best candidates of a round, which the next one is centered on.", at_least=1
    )
    width: float = setting(
        0.3,
        "Smallest standard deviation of the first round's actions, in [-1, 1]; of discrete actions "
        "that are too many to try all, the uniform fraction.",
    )
    hold: int = setting(
        1,
        "Steps for which every second candidate of the cross-entropy search holds its first "
        "action, so that plans reach further from the policy.",
        at_least=1,
    )
    horizon: int = setting(4, "Steps P of each candidate.", at_least=1)
    explore: bool = setting(True, "Plan optimistically in the training environments.")
    explore_rate: float = setting(
        0.1, "Bonus for uncertainty in the training environments.", at_least=float("-inf")
    )
    imagine_fraction: float = setting(
        0.5, "Fraction of the imagined rollouts that are planned, conservatively.", at_most=1
    )
    imagine_rate: float = setting(
        0.05, "Penalty for uncertainty in imagined rollouts.", at_least=float("-inf")
    )
    act_rate: float = setting(
        0.0,
        "Bonus for uncertainty where the planner acts at evaluation; negative: a penalty.",
        at_least=float("-inf"),
    )
    replan_every: int = setting(
        0,
        "Imagined steps between plans; the chosen candidate is followed until the next plan; 0: to "
        "its end.",
    )
    value: bool = setting(True, "Add the slow critic's value of the state after the last step.")
    discount: bool = setting(
        True,
        "Discount a candidate's rewards as returns do; false: only a predicted end of the episode "
        "discounts.",
    )
    normalize_reward: bool = setting(True, "Divide returns by the return scale.")
    normalize_uncertainty: bool = setting(
        True, "Divide the uncertainty by its running scale, which never decreases."
    )


@dataclass(frozen=True)
class MpdpConfig:
    """MPDP, the actor's multi-step objective."""

    policies: str = setting(
        "shared",
        "One policy for each future step, or one policy for all steps.",
        choices=("per_step", "shared"),
    )
    horizon: int = setting(15, "Steps H that are improved together.", at_least=1)
    beta: float = setting(
        0.5, "Penalty, in mean rewards, for an uncertainty as large as its scale."
    )
    adaptive_horizon: bool = setting(True, "End the horizon where a step is too uncertain.")
    threshold: float = setting(
        1.0, "Uncertainty that ends the horizon, in units of its scale.", above=0
    )
    entropy_fraction: float = setting(
        1.0, "Fraction of behavior.entropy that MPDP adds at every future step.", above=0
    )


@dataclass(frozen=True)
class DistillConfig:
    """Distillation of plans into the actor."""

    weight: float = setting(
        0.0,
        "Weight of the loss towards plans: with plan.search=samples that of the better candidates, "
        "with cross_entropy the norm of its gradient as a fraction of the policy gradient's.",
    )
    temperature: float = setting(
        0.05, "Temperature of the weights over candidate scores, in return scales.", above=0
    )
    states: int = setting(32, "Replayed states that are planned for again at once; 0: none.")
    every: int = setting(4, "Updates between plans for replayed states.", at_least=1)
    stored: bool = setting(
        False,
        "Store the plans that choose actions in training, and teach them to the actor whenever "
        "their states are replayed; for plan.search=cross_entropy.",
    )


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer."""

    world_lr: float = setting(4e-5, "Learning rate of the world model.", above=0)
    actor_lr: float = setting(4e-5, "Learning rate of the actor.", above=0)
    critic_lr: float = setting(4e-5, "Learning rate of the critic.", above=0)
    temperature_lr: float = setting(
        0.01, "Learning rate of the logarithm of a tuned entropy temperature.", above=0
    )
    warmup: int = setting(
        1000,
        "Updates over which learning rates rise; during twice as many updates the uncertainty's "
        "scale may decrease.",
    )
    clip: float = setting(
        0.3, "Adaptive gradient clipping, relative to the norm of the weights.", above=0
    )
    beta1: float = setting(0.9, "LaProp's decay of the momentum.", at_most=1)
    beta2: float = setting(0.999, "LaProp's decay of the squared gradients.", at_most=1)


@dataclass(frozen=True)
class TrainConfig:
    """The training loop."""

    ratio: float = setting(512.0, "Replayed rows per decision.", above=0)
    batch: int = setting(16, "Sequences B of an update.", at_least=1)
    length: int = setting(64, "Rows T of each sequence.", at_least=2)
    context: int = setting(
        0,
        "Rows before each sequence from which its first latent state is filtered. They carry no "
        "loss.",
    )
    prefill: int = setting(1000, "Decisions of a random policy before the first update.")
    init_from: str = setting(
        "",
        "A run folder or checkpoint file whose weights a new run begins with, where they fit; "
        "empty: fresh weights.",
        path=True,
    )
    offline: str = setting(
        "",
        "A folder of recorded rows that the run learns from, without steps of an environment: the "
        "replay folder of another run, or imported episodes; empty: none.",
        path=True,
    )
    minutes: float = setting(
        0.0, "Minutes of wall clock after which this session stops; 0: no limit."
    )
    compile: str = setting(
        "auto",
        "Compile the agent's functions with torch.compile; auto: on.",
        choices=("auto", "on", "off"),
    )
    precision: str = setting(
        "auto",
        "Precision of large products; auto: bfloat16 if the hardware multiplies it natively.",
        choices=("auto", "float32", "bfloat16"),
    )
    threads: int = setting(0, "Threads of torch; 0: one per core.", at_most=1024)


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation during training."""

    every: int = setting(10_000, "Frames between evaluations; 0: only at the end.")
    episodes: int = setting(5, "Episodes of an evaluation.", at_least=1)
    video: bool = setting(True, "Record a video of the first evaluation episode.")


@dataclass(frozen=True)
class LogConfig:
    """Logs, checkpoints and films."""

    every: int = setting(1000, "Frames between rows of metrics.", at_least=1)
    checkpoint_seconds: float = setting(
        300.0,
        "Seconds between checkpoints; a new run writes its first after 30; 0: only at the end.",
    )
    keep: int = setting(
        0, "Frames between checkpoints that are kept beside the newest and the best; 0: none."
    )
    inspect_every: int = setting(20_000, "Frames between films of imagination; 0: never.")
    inspect_context: int = setting(
        5, "Context rows of a film; after them the model predicts open-loop.", at_least=1
    )
    sinks: str = setting(
        "", f"Where metrics also go, separated by commas: {', '.join(SINKS)}; empty: nowhere else."
    )


def sink_names(text: str) -> list[str]:
    """The names in a value of ``log.sinks``, each once."""
    return list(dict.fromkeys(filter(None, map(str.strip, text.split(",")))))


@dataclass(frozen=True)
class Config:
    """The configuration of a run."""

    task: str = setting(
        "dmc:cartpole_swingup", "Task: a dm_control task, gym:ID, dummy:pixels, or dummy:discrete."
    )
    obs: str = setting("pixels", "What the agent observes.", choices=("pixels", "state", "both"))
    size: str = setting("auto", "A file of configs/size; auto: 12m with CUDA, else cpu.")
    ablation: str = setting("none", "A file of configs/ablation, or none.")
    seed: int = setting(0, "Seed of training; evaluation has its own.", at_most=2**64 - 1)
    steps: int = setting(1_000_000, "Environment frames to train for.", at_least=1)
    run_dir: str = setting(
        "",
        "Folder of the run; empty: runs/<task>-<obs>-<size>[-<ablation>]-s<seed>.",
        path=True,
    )
    device: str = setting("auto", "Device of the agent: auto, cpu, cuda, or cuda:N.")
    env: EnvConfig = field(default_factory=EnvConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    world: WorldConfig = field(default_factory=WorldConfig)
    behavior: BehaviorConfig = field(default_factory=BehaviorConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    mpdp: MpdpConfig = field(default_factory=MpdpConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)
