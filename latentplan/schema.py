"""The schema of the configuration: every key, its type and its default."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class EnvConfig:
    repeat: int = 2  # frames per decision (action repeat)
    image_size: int = 64  # pixels per side; divisible by 16
    episode_frames: int = 1000  # an episode is cut here
    count: int = 1  # environments that collect in turn with learning
    workers: bool = True  # one spawned process per environment; false: all in this process
    timeout: float = 180.0  # seconds that one step may take
    renderer: str = "auto"  # auto | egl | osmesa | glfw
    render_quality: str = "auto"  # auto | exact | fast (no shadows, no multisampling)
    module: str = ""  # a Python module or file that registers Gymnasium environments


@dataclass(frozen=True)
class ReplayConfig:
    capacity: int = 500_000  # rows (decisions) over all environments


def judged_by(uncertainty: str) -> str:
    """The key of `WorldConfig` that counts the ensemble behind such a measure."""
    return "probe_members" if uncertainty == "probes" else "members"


@dataclass(frozen=True)
class WorldConfig:
    deter: int = 2048  # recurrent state D
    stoch: int = 32  # groups S
    classes: int = 16  # classes C of each group
    hidden: int = 256  # width inside the recurrent core and the posterior
    blocks: int = 8  # of the block-diagonal recurrent core
    units: int = 256  # width of the heads' and vector coders' MLPs
    layers: int = 1  # hidden layers of reward and continue heads
    vector_layers: int = 3  # layers of the vector encoder, hidden layers of the decoder
    depth: int = 16  # channels after the first halving of the picture; they double at each halving
    members: int = 5  # ensemble members M
    member_hidden: int = 256  # width of each prior head
    bootstrap: float = 0.8  # share of episodes each of several members learns from
    member_per: str = "rollout"  # rollout | step: how long one member moves an imagined row
    uncertainty: str = "jsd"  # jsd | std | kl_rest | probes
    probe_members: int = 8  # probes, where they measure the uncertainty
    probe_units: int = 512  # width of their two hidden layers
    unimix: float = 0.01  # share of the uniform in every categorical
    soft_updates: int = 0  # states pass from probabilities to samples over these first updates
    bins: int = 255  # of the two-hot reward
    free_nats: float = 1.0  # below which neither posterior nor core is pulled to the prior
    representation: str = "decoder"  # decoder | barlow: what makes states tell what was seen
    barlow_scale: float = 0.05  # weight of its loss
    recon_scale: float = 1.0  # of the squared errors of pixels and vectors
    dyn_scale: float = 1.0  # of the priors' KL from the posterior
    rep_scale: float = 0.1  # of the posterior's from the priors
    coder: str = "strided"  # strided | patch: how pictures lose and regain their first factor 4
    norm: str = "rms"  # rms | layer; ensembles always have layer
    decode_fraction: float = 1.0  # share of the batch's frames that are reconstructed

    @property
    def judges(self) -> int:
        """Members of the ensemble whose disagreement is the uncertainty."""
        return getattr(self, judged_by(self.uncertainty))


@dataclass(frozen=True)
class BehaviorConfig:
    improvement: str = "dreamer"  # dreamer | mpdp: what the actor climbs
    gradient: str = "reinforce"  # reinforce | pathwise: how
    horizon: int = 15  # imagined steps H
    discount_horizon: float = 333.0  # in decisions; discount = 1 - 1/discount_horizon
    lam: float = 0.95  # of the lambda-returns
    entropy: float = 3e-4  # bonus per nat, in units of the return scale; MPDP: mpdp.entropy_share
    target_entropy: float | None = (
        None  # nats per action dimension to tune the bonus to; null: none
    )
    units: int = 256  # width of actor and critic
    layers: int = 3  # hidden layers of both
    std_min: float = 0.1  # of an action in [-1, 1]
    std_max: float = 1.0  # of the same
    bins: int = 255  # of the two-hot value
    slow_rate: float = 0.02  # of the slow critic, per update
    slow_scale: float = 1.0  # pull of the critic towards the slow one
    replay_scale: float = 0.3  # weight of the value loss on replayed rows
    scale_rate: float = 0.01  # of the running scales: of returns, and of the uncertainty
    starts_fraction: float = 1.0  # share of the batch's rows that imagination starts from

    @property
    def discount(self) -> float:
        """Per decision."""
        return 1 - 1 / self.discount_horizon


@dataclass(frozen=True)
class PlanConfig:
    candidates: int = 1  # K rollouts of the policy to choose from; 1 is the policy itself
    horizon: int = 4  # P, steps of each
    explore: bool = True  # plan in the training environments, optimistically
    explore_rate: float = 0.1  # bonus there, per unit of uncertainty
    imagine_share: float = 0.5  # of the imagined trajectories are planned, conservatively
    imagine_rate: float = 0.05  # penalty there
    act_rate: float = 0.0  # bonus (or penalty, < 0) where a plan acts at test time
    replan_every: int = 0  # imagined steps; between plans the choice is followed; 0: to its end
    value: bool = True  # the slow critic values the state after the last step
    discount: bool = True  # as the returns; off: only a predicted end discounts
    normalize_reward: bool = True  # by the return scale
    normalize_uncertainty: bool = True  # by its own scale, which never decreases


@dataclass(frozen=True)
class MpdpConfig:
    policies: str = "shared"  # per_step | shared: one policy per future step, or one for all
    horizon: int = 15  # H, steps that are improved together
    beta: float = 0.5  # penalty, in mean rewards, of an uncertainty as large as its scale
    adaptive_horizon: bool = True  # stop where a step is too uncertain
    threshold: float = 1.0  # in units of the uncertainty scale
    entropy_share: float = 1.0  # of behavior.entropy: its critic pays that at every step to come


@dataclass(frozen=True)
class DistillConfig:
    weight: float = 0.0  # of the pull towards the better of a plan's candidates
    temperature: float = 0.05  # of the weights over their scores, in return scales


@dataclass(frozen=True)
class OptimConfig:
    world_lr: float = 4e-5  # of the world model
    actor_lr: float = 4e-5  # of the actor
    critic_lr: float = 4e-5  # of the critic
    temperature_lr: float = 0.01  # of its logarithm, which has far to go in few updates
    warmup: int = 1000  # updates over which rates rise; twice as many the uncertainty's scale falls
    clip: float = 0.3  # adaptive gradient clipping, relative to the weights' norms
    beta1: float = 0.9  # of LaProp: momentum
    beta2: float = 0.999  # of LaProp: squared gradients


@dataclass(frozen=True)
class TrainConfig:
    ratio: float = 512.0  # replayed rows per decision
    batch: int = 16  # sequences B
    length: int = 64  # rows T of each
    prefill: int = 1000  # decisions by a random policy before the first update
    minutes: float = 0.0  # stop after this much wall clock; 0: no limit
    compile: str = "auto"  # auto (cell on CUDA, else full) | off | cell | full: compiling.py
    precision: str = "auto"  # auto (bfloat16 where the hardware multiplies it) | float32 | bfloat16
    threads: int = 0  # of torch; 0: all cores


@dataclass(frozen=True)
class EvalConfig:
    every: int = 10_000  # frames; 0: at the end only
    episodes: int = 5  # each time
    video: bool = True  # film the first evaluation episode


@dataclass(frozen=True)
class LogConfig:
    every: int = 1000  # frames between rows of metrics
    checkpoint_seconds: float = 300.0  # a new run's first comes after 30; 0: at the end only
    inspect_every: int = 20_000  # frames between films and plan fans; 0: never
    inspect_context: int = 5  # rows that the model sees before it is on its own


@dataclass(frozen=True)
class Config:
    task: str = "dmc:cartpole_swingup"  # also gym:ID and dummy:pixels
    obs: str = "pixels"  # pixels | state | both
    size: str = "auto"  # a file of configs/size; auto: 12m with CUDA, else cpu
    ablation: str = "none"  # a file of configs/ablation
    seed: int = 0  # of everything; evaluation has its own
    steps: int = 1_000_000  # environment frames
    run_dir: str = ""  # empty: runs/<task>-<obs>-<size>[-<ablation>]-s<seed>
    device: str = "auto"  # auto | cpu | cuda | cuda:N
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
