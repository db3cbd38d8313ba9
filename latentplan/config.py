"""The configuration: dataclasses are the schema, YAML files and ``key.sub=value`` merge into it.

Later sources win: defaults of the dataclasses, ``configs/default.yaml``, ``configs/task/<task or
domain>.yaml``, ``configs/size/<size>.yaml``, ``configs/ablation/<ablation>.yaml``, files named on
the command line, overrides. The result is frozen; a module receives its own section.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from latentplan.types import UserError


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


@dataclass(frozen=True)
class WorldConfig:
    deter: int = 2048
    stoch: int = 32  # groups S
    classes: int = 16  # classes C of each group
    hidden: int = 256  # width inside the recurrent core and the posterior
    blocks: int = 8  # of the block-diagonal recurrent core
    units: int = 256  # width of the heads' and vector coders' MLPs
    layers: int = 1  # hidden layers of reward and continue heads
    vector_layers: int = 3  # hidden layers of the vector encoder and decoder
    depth: int = 16  # channels after the first halving of the picture; they double at each halving
    members: int = 5  # ensemble members M
    member_hidden: int = 256  # width of each prior head
    bootstrap: float = 0.8  # share of episodes each member learns from
    member_per: str = "rollout"  # rollout | step: how long one member moves an imagined row
    uncertainty: str = "jsd"  # jsd | std | kl_rest | probes
    probe_units: int = 512  # width of the probes' two hidden layers
    unimix: float = 0.01  # share of the uniform in every categorical
    bins: int = 255  # of the two-hot reward
    free_nats: float = 1.0
    recon_scale: float = 1.0  # of the squared errors of pixels and vectors
    dyn_scale: float = 1.0
    rep_scale: float = 0.1
    coder: str = "strided"  # strided | patch: how pictures lose and regain their first factor 4
    norm: str = "rms"  # rms | layer
    decode_fraction: float = 1.0  # share of the batch's frames that are reconstructed


@dataclass(frozen=True)
class BehaviorConfig:
    gradient: str = "reinforce"  # reinforce | pathwise: how the actor climbs its returns
    horizon: int = 15  # imagined steps H
    discount_horizon: float = 333.0  # in decisions; discount = 1 - 1/discount_horizon
    lam: float = 0.95  # of the lambda-returns
    entropy: float = 3e-4  # bonus per nat, in units of the return scale
    units: int = 256
    layers: int = 3
    std_min: float = 0.1
    std_max: float = 1.0
    bins: int = 255  # of the two-hot value
    slow_rate: float = 0.02  # of the slow critic, per update
    slow_scale: float = 1.0  # pull of the critic towards the slow one
    replay_scale: float = 0.3  # weight of the value loss on replayed rows
    scale_rate: float = 0.01  # of the running 5-95 percentile range
    starts_fraction: float = 1.0  # share of the batch's rows that imagination starts from


@dataclass(frozen=True)
class OptimConfig:
    world_lr: float = 4e-5
    actor_lr: float = 4e-5
    critic_lr: float = 4e-5
    warmup: int = 1000  # updates
    clip: float = 0.3  # adaptive gradient clipping, relative to the weights' norms
    beta1: float = 0.9
    beta2: float = 0.999


@dataclass(frozen=True)
class TrainConfig:
    ratio: float = 512.0  # replayed rows per decision
    batch: int = 16  # sequences B
    length: int = 64  # rows T of each
    prefill: int = 1000  # decisions by a random policy before the first update
    minutes: float = 0.0  # stop after this much wall clock; 0: no limit
    precision: str = "auto"  # auto | float32 | bfloat16 (convolutions, heads, imagination)
    threads: int = 0  # of torch; 0: all cores


@dataclass(frozen=True)
class EvalConfig:
    every: int = 10_000  # frames
    episodes: int = 5
    video: bool = True  # film the first evaluation episode


@dataclass(frozen=True)
class LogConfig:
    every: int = 1000  # frames between rows of metrics
    checkpoint_seconds: float = 300.0  # between checkpoints; the first comes within a minute
    film_every: int = 20_000  # frames between open-loop films
    film_context: int = 5  # rows the film's model sees before it predicts


@dataclass(frozen=True)
class Config:
    task: str = "dmc:cartpole_swingup"
    obs: str = "pixels"  # pixels | state | both
    size: str = "auto"  # a file of configs/size; auto: 12m with CUDA, else cpu
    ablation: str = "none"  # a file of configs/ablation
    seed: int = 0
    steps: int = 1_000_000  # environment frames
    run_dir: str = ""  # empty: runs/<task>-<obs>-<size>-s<seed>
    device: str = "auto"  # auto | cpu | cuda | cuda:N
    env: EnvConfig = field(default_factory=EnvConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    world: WorldConfig = field(default_factory=WorldConfig)
    behavior: BehaviorConfig = field(default_factory=BehaviorConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)


CHOICES = {
    "obs": ("pixels", "state", "both"),
    "env.renderer": ("auto", "egl", "osmesa", "glfw"),
    "env.render_quality": ("auto", "exact", "fast"),
    "world.member_per": ("rollout", "step"),
    "world.uncertainty": ("jsd", "std", "kl_rest", "probes"),
    "world.coder": ("strided", "patch"),
    "world.norm": ("rms", "layer"),
    "behavior.gradient": ("reinforce", "pathwise"),
    "train.precision": ("auto", "float32", "bfloat16"),
}


def load(files: Sequence[str | Path] = (), overrides: Sequence[str] = ()) -> Config:
    """Merge presets, files and ``key.sub=value`` overrides into a frozen configuration.

    Raises:
        UserError: unknown key (naming the nearest), wrong type (naming the field), unreadable file,
            or a value outside a field's choices.
    """
    user = [_read(Path(name)) for name in files] + [_parse(item) for item in overrides]
    chosen = _merge([_schema(), _read(preset_folder() / "default.yaml"), *user])
    size = chosen.size if chosen.size != "auto" else _default_size(chosen.device)
    task = task_preset(chosen.task)
    presets = [] if task is None else [_read(task)]
    # After the task: published sizes bring the published protocol (action repeat 2) along.
    presets.append(_preset("size", size))
    if chosen.ablation != "none":
        presets.append(_preset("ablation", chosen.ablation))
    merged = _merge([_schema(), _read(preset_folder() / "default.yaml"), *presets, *user])
    merged.size = size
    return _finish(merged)


def load_resolved(path: Path) -> Config:
    """Read the ``config.yaml`` of a run folder, which is already resolved: no preset is applied."""
    return _finish(_merge([_schema(), _read(path)]))


def to_yaml(config: Config) -> str:
    return OmegaConf.to_yaml(OmegaConf.create(asdict(config)))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"env": {"repeat": 2}} -> {"env.repeat": 2}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def preset_folder() -> Path:
    """``configs/``: beside the package in a checkout, inside it when installed."""
    here = Path(__file__).resolve().parent
    inside = here / "configs"
    return inside if inside.is_dir() else here.parent / "configs"


def task_preset(task: str) -> Path | None:
    """The file of ``configs/task`` for a task: its own, or its domain's (the longest that fits)."""
    # Whatever spelling the environments take (``envs/names.py``) must find its preset.
    name = re.sub(r"[-/:\s]+", "_", task.strip().lower()).removeprefix("dmc_")
    if name.startswith("cup_"):  # the usual short name of ball_in_cup
        name = "ball_in_" + name
    presets = (preset_folder() / "task").glob("*.yaml")
    fitting = [path for path in presets if f"{name}_".startswith(f"{path.stem}_")]
    return max(fitting, key=lambda path: len(path.stem), default=None)


def _default_size(device: str) -> str:
    if device.startswith("cpu"):
        return "cpu"
    import torch  # seconds; only where the answer depends on the hardware

    return "12m" if torch.cuda.is_available() else "cpu"


def _preset(kind: str, name: str) -> DictConfig:
    path = preset_folder() / kind / f"{name}.yaml"
    if not path.is_file():
        names = sorted(p.stem for p in path.parent.glob("*.yaml"))
        raise UserError(f"There is no {kind} {name!r}; there are: {', '.join(names)}.")
    return _read(path)


def _read(path: Path) -> DictConfig:
    try:
        node = OmegaConf.load(path)
    except OSError as error:
        raise UserError(f"The configuration {path} cannot be read: {error.strerror}.") from error
    except (YAMLError, ValueError, OmegaConfBaseException) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"The configuration {path} is not valid YAML: {reason}.") from error
    if not isinstance(node, DictConfig):
        raise UserError(f"The configuration {path} is not a mapping of keys to values.")
    _check_keys(node, str(path))
    return node


def _parse(item: str) -> DictConfig:
    if "=" not in item:
        raise UserError(f"{item!r} is neither a file nor an override of the form key=value.")
    try:
        node = OmegaConf.from_dotlist([item])
    except (YAMLError, ValueError, OmegaConfBaseException) as error:
        raise UserError(f"The override {item!r} cannot be parsed.") from error
    _check_keys(node, item)
    return node


def _check_keys(node: DictConfig, where: str) -> None:
    known = flatten(OmegaConf.to_container(_schema()))
    sections = {field.name for field in fields(Config) if is_dataclass(field.default_factory)}
    for key in flatten(OmegaConf.to_container(node, resolve=False)):
        if key in sections:
            raise UserError(f"{key} in {where} is a section: set its keys, {key}.<key>=<value>.")
        if key not in known:
            # The full path first; else the last part alone, for a key typed without its section.
            near = difflib.get_close_matches(key, known, 1, 0.6) or [
                k for k in known if k.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]
            ]
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise UserError(f"Unknown key {key!r} in {where}{hint}")


def _schema() -> DictConfig:
    schema = OmegaConf.structured(Config)
    _thaw(schema)
    return schema


def _thaw(node: DictConfig) -> None:
    """OmegaConf makes frozen dataclasses read-only, also while they are being merged."""
    OmegaConf.set_readonly(node, False)
    for key in node:
        if isinstance(node[key], DictConfig):
            _thaw(node[key])


def _merge(nodes: Sequence[DictConfig]) -> DictConfig:
    try:
        merged = OmegaConf.merge(*nodes)
        OmegaConf.resolve(merged)  # here, where a bad ${reference} can still be named
        return merged
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0].rstrip(".")
        where = f" for {error.full_key!r}" if error.full_key else ""
        raise UserError(f"Wrong value{where}: {reason}.") from error


def _finish(merged: DictConfig) -> Config:
    flat = flatten(OmegaConf.to_container(merged))
    for key, choices in CHOICES.items():
        if flat[key] not in choices:
            raise UserError(f"{key} must be one of {', '.join(choices)}, not {flat[key]!r}.")
    if not flat["run_dir"]:
        task = flat["task"].replace(":", "-").replace("/", "-")
        merged.run_dir = f"runs/{task}-{flat['obs']}-{flat['size']}-s{flat['seed']}"
    return OmegaConf.to_object(merged)
