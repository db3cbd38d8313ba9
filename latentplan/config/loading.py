"""The configuration: the schema is ``schema.py``, YAML files and ``key.sub=value`` merge into it.

Later sources win: defaults of the dataclasses, ``configs/default.yaml``, ``configs/task/<task or
domain>.yaml``, ``configs/size/<size>.yaml``, ``configs/ablation/<ablation>.yaml``, files named on
the command line, overrides. The result is frozen.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from latentplan.config.renamed import RENAMED, present_names
from latentplan.config.schema import Config
from latentplan.config.tasks import parse_task
from latentplan.config.validation import bounds_of, check
from latentplan.runtime import device
from latentplan.types import UserError

log = logging.getLogger("latentplan")
SWITCH = {"false": "off", "true": "on"}  # of keys that can be on or off, among others


def as_config(source: Config | Mapping[str, Any] | Sequence[str]) -> Config:
    """A configuration from one, from keys and values, or from what the command line takes.

    Args:
        source: a `Config`; a mapping whose keys are dotted or nested; or files and ``key=value``.

    Raises:
        UserError: as :func:`load`.
    """
    if isinstance(source, Config):
        return source
    if isinstance(source, Mapping):
        return _resolve([_from_mapping(source)])
    overrides = [item for item in source if "=" in item]
    return load([item for item in source if "=" not in item], overrides)


def load(files: Sequence[str | Path] = (), overrides: Sequence[str] = ()) -> Config:
    """Merge presets, files and ``key.sub=value`` overrides into a frozen configuration.

    Raises:
        UserError: a key is unknown (the message names the nearest one), a value has the wrong type
            or is outside its bounds, or a file cannot be read.
    """
    return _resolve([*(_read(Path(name)) for name in files), *map(_parse, overrides)])


def _resolve(user: Sequence[DictConfig]) -> Config:
    """Put the presets that ``user`` chooses before it."""
    chosen = _merge([_schema(), _read(preset_folder() / "default.yaml"), *user])
    size = chosen.size if chosen.size != "auto" else _default_size(chosen.device)
    task = task_preset(chosen.task)
    presets = [] if task is None else [_read(task)]
    # After the task: published sizes bring the published protocol (action repeat 2) along.
    presets.append(_preset("size", size))
    presets += _ablation(chosen.ablation)
    merged = _merge([_schema(), _read(preset_folder() / "default.yaml"), *presets, *user])
    merged.size = size
    return _finish(merged)


def load_resolved(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read the ``config.yaml`` of a run folder, which is already resolved: no preset is applied.

    Raises:
        UserError: as :func:`load`, or the file is empty.
    """
    saved = _read(path)
    if not saved:  # some keys may be missing, in runs of earlier versions, but not all
        raise UserError(f"The configuration {path} is empty.")
    return _finish(_merge([_schema(), saved, *map(_parse, overrides)]))


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


def _flat(node: DictConfig) -> dict[str, Any]:
    """Every key of a node; references stay as they are."""
    return flatten(cast("dict[str, Any]", OmegaConf.to_container(node, resolve=False)))


def preset_folder() -> Path:
    """``configs/``; the package holds a link to it, which a wheel replaces by the files."""
    return Path(__file__).resolve().parents[1] / "configs"


def task_preset(task: str) -> Path | None:
    """The file of ``configs/task`` for a task: its own, or its domain's (the longest that fits)."""
    name = _task_name(task)
    presets = (preset_folder() / "task").glob("*.yaml")
    fitting = [path for path in presets if f"{name}_".startswith(f"{path.stem}_")]
    return max(fitting, key=lambda path: len(path.stem), default=None)


def _task_name(task: str) -> str:
    """One name, which a folder can have, for all spellings of a task."""
    suite, name = parse_task(task)
    return name if suite == "dmc" else f"{suite}-{name}".replace("/", "-")


def _default_size(name: str) -> str:
    if name.startswith("cpu"):
        return "cpu"
    return "12m" if device.has_cuda() else "cpu"


def _preset(kind: str, name: str) -> DictConfig:
    path = preset_folder() / kind / f"{name}.yaml"
    if not path.is_file():
        names = sorted(p.stem for p in path.parent.glob("*.yaml"))
        raise UserError(f"There is no {kind} {name!r}; there are: {', '.join(names)}.")
    return _read(path)


def _ablation(name: str) -> list[DictConfig]:
    """The file of an ablation, behind that of the one that its own ``ablation`` builds on."""
    if name == "none":
        return []
    preset = _preset("ablation", name)
    return [*_ablation(preset.pop("ablation", "none")), preset]


def _read(path: Path) -> DictConfig:
    """A file of keys, in sections or dotted as on the command line."""
    try:
        text = path.read_text(encoding="utf-8")
        node, written = OmegaConf.create(text), yaml.load(text, yaml.BaseLoader)
    except OSError as error:
        hint = "" if path.suffix else f" (overrides are written key=value, a task as task={path})"
        raise UserError(
            f"The configuration {path} cannot be read: {error.strerror}{hint}."
        ) from error
    except (YAMLError, ValueError, OmegaConfBaseException) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"The configuration {path} is not valid YAML: {reason}.") from error
    if not isinstance(node, DictConfig):
        raise UserError(f"The configuration {path} is not a mapping of keys to values.")
    # References are not resolved yet: they may be to keys of other files.
    flat = _flat(node)
    flat, changes = present_names(_texts_as_written(flat, flatten(written)))
    _check_keys(flat, str(path))
    if changes:
        _warn_of_renamed(path, "; ".join(changes))
    return _nested(flat)


def _nested(flat: Mapping[str, Any]) -> DictConfig:
    """``{"env.repeat": 2}`` -> ``{"env": {"repeat": 2}}``. Of a key that is there twice the later
    value stays."""
    nested = OmegaConf.create()
    for key, value in flat.items():
        OmegaConf.update(nested, key, value)
    _correct_types(nested)
    return nested


@cache  # one warning for each file, however often it is read
def _warn_of_renamed(path: Path, changes: str) -> None:
    log.warning("%s has names of an earlier version, which were read: %s.", path, changes)


def _parse(item: str) -> DictConfig:
    if "=" not in item:
        raise UserError(f"{item!r} is neither a file nor an override of the form key=value.")
    try:
        node = OmegaConf.from_dotlist([item])
    except (YAMLError, ValueError, OmegaConfBaseException) as error:
        raise UserError(f"The override {item!r} cannot be parsed.") from error
    key, _, text = item.partition("=")
    flat = _flat(node)
    return _from_typed(_texts_as_written(flat, {key: text}), item)


def _from_mapping(settings: Mapping[str, Any]) -> DictConfig:
    return _from_typed(flatten(settings), "the configuration")


def _from_typed(flat: Mapping[str, Any], where: str) -> DictConfig:
    """Keys that somebody types now, who should know of their present names."""
    for key in flat:
        if key in RENAMED:
            raise UserError(f"{key} in {where} has another name now: {RENAMED[key]}.")
    _check_keys(flat, where)
    return _nested(flat)


def _check_keys(flat: Mapping[str, Any], where: str) -> None:
    known = _known()
    sections = {field.name for field in fields(Config) if is_dataclass(field.default_factory)}
    for key in flat:
        if key in sections:
            raise UserError(f"{key} in {where} is a section: set its keys, {key}.<key>=<value>.")
        if key not in known:
            tail = key.rsplit(".", 1)[-1]
            twins = [k for k in known if k.rsplit(".", 1)[-1] == tail]
            close = difflib.get_close_matches(key, known, 1, 0.6)
            # A key typed without its section may be any of its namesakes.
            near = (close or twins) if "." in key else (twins or close)
            hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else "."
            raise UserError(f"Unknown key {key!r} in {where}{hint}")


def _texts_as_written(flat: Mapping[str, Any], written: Mapping[str, Any]) -> dict[str, Any]:
    """``flat`` with the values of text keys as somebody wrote them.

    YAML would read ``off`` as false, 1.10 as 1.1 and 12:30 as a number.
    """
    known = _known()

    def is_text(key: str) -> bool:
        return isinstance(known.get(RENAMED.get(key, key)), str)

    return {
        key: written[key] if is_text(key) and isinstance(written.get(key), str) else value
        for key, value in flat.items()
    }


def _correct_types(node: DictConfig) -> None:
    """Convert values that YAML reads as another type: 1e6 as a float, false for ``off``."""
    known = _known()
    for key, value in _flat(node).items():
        if "off" in bounds_of(key).choices and str(value).lower() in SWITCH:
            OmegaConf.update(node, key, SWITCH[str(value).lower()])
        if isinstance(value, float) and value.is_integer() and type(known[key]) is int:
            OmegaConf.update(node, key, int(value))


@cache
def _known() -> Mapping[str, Any]:
    """Every key and its default."""
    return MappingProxyType(_flat(_schema()))


@cache  # to be merged, which copies it
def _schema() -> DictConfig:
    schema: DictConfig = OmegaConf.structured(Config)
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
        merged = cast(DictConfig, OmegaConf.merge(*nodes))
        OmegaConf.resolve(merged)  # here, where a bad ${reference} can still be named
        return merged
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0].rstrip(".")
        where = f" for {error.full_key!r}" if error.full_key else ""
        raise UserError(f"Wrong value{where}: {reason}.") from error


def _finish(merged: DictConfig) -> Config:
    flat = _flat(merged)
    check(flat)
    if not flat["run_dir"]:
        task = _task_name(flat["task"])
        ablation = "" if flat["ablation"] == "none" else f"-{flat['ablation']}"
        merged.run_dir = f"runs/{task}-{flat['obs']}-{flat['size']}{ablation}-s{flat['seed']}"
    return cast(Config, OmegaConf.to_object(merged))
