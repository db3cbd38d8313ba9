"""Loading of the configuration: YAML files and ``key.sub=value`` overrides of the schema.

The sources are, in this order: the defaults of the dataclasses in ``schema.py``,
``configs/default.yaml``, ``configs/task/<task or domain>.yaml``, ``configs/size/<size>.yaml``,
``configs/obs/<obs>.yaml`` where there is one, ``configs/ablation/<ablation>.yaml``, files named on
the command line, overrides. A later source replaces values of earlier ones. The result is frozen.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
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
from latentplan.config.validation import bounds_of, check, schema_sections
from latentplan.runtime import device
from latentplan.types import UserError

log = logging.getLogger("latentplan")
SWITCH_WORDS = {"false": "off", "true": "on"}  # other spellings of the choices off and on


def as_config(source: Config | Mapping[str, Any] | Sequence[str]) -> Config:
    """Make a configuration.

    Args:
        source: a `Config`, which is returned unchanged; a mapping whose keys are dotted or nested;
            or files and ``key=value`` items, as on the command line.

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
    """Merge the user's settings with the presets that they choose."""
    base = [_schema(), _read(preset_folder() / "default.yaml")]
    chosen = _merge([*base, *user])
    size = chosen.size if chosen.size != "auto" else _default_size(chosen.device)
    task = task_preset(chosen.task)
    presets = [] if task is None else [_read(task)]
    # The size comes after the task because published sizes set the published action repeat of 2.
    presets.append(_preset("size", size))
    presets += _optional("obs", chosen.obs) + _ablation(chosen.ablation)
    merged = _merge([*base, *presets, *user])
    merged.size = size
    return _to_config(merged)


def load_resolved(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read the ``config.yaml`` of a run folder. No presets are applied, since it has all values.

    Raises:
        UserError: as :func:`load`, or the file is empty.
    """
    saved = _read(path)
    if not saved:  # Runs of earlier versions may lack some keys, but no run lacks all.
        raise UserError(f"The configuration {path} is empty.")
    return _to_config(_merge([_schema(), saved, *map(_parse, overrides)]))


def to_yaml(config: Config) -> str:
    """All values of a configuration as YAML, which :func:`load_resolved` reads."""
    return OmegaConf.to_yaml(OmegaConf.create(asdict(config)))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys as dotted keys: ``{"env": {"repeat": 2}}`` gives ``{"env.repeat": 2}``.

    If a key occurs both nested and dotted, the later value is kept.
    """
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _flat(node: DictConfig) -> dict[str, Any]:
    """The dotted keys of a node and their values. References are not resolved."""
    return flatten(cast("dict[str, Any]", OmegaConf.to_container(node, resolve=False)))


def preset_folder() -> Path:
    """The folder ``configs`` inside the package. In a checkout it is a link to the top folder."""
    return Path(__file__).resolve().parents[1] / "configs"


def task_preset(task: str) -> Path | None:
    """The file in ``configs/task`` for a task or, if there is none, for its domain.

    If several files match, the one with the longest name is used. None if no file matches.
    """
    name = _task_name(task)
    presets = (preset_folder() / "task").glob("*.yaml")
    matching = [path for path in presets if f"{name}_".startswith(f"{path.stem}_")]
    return max(matching, key=lambda path: len(path.stem), default=None)


def _task_name(task: str) -> str:
    """A name for a task that can be part of a file name. It is the same for all spellings."""
    suite, name = parse_task(task)
    return name if suite == "dmc" else f"{suite}-{name}".replace("/", "-")


def _default_size(device_name: str) -> str:
    if device_name.startswith("cpu"):
        return "cpu"
    return "12m" if device.has_cuda() else "cpu"


def _preset(kind: str, name: str) -> DictConfig:
    """Read a preset. ``kind`` is the name of a folder of presets."""
    path = preset_folder() / kind / f"{name}.yaml"
    if not path.is_file():
        names = sorted(p.stem for p in path.parent.glob("*.yaml"))
        raise UserError(f"There is no {kind} {name!r}; choose one of: {', '.join(names)}.")
    return _read(path)


def _optional(kind: str, name: str) -> list[DictConfig]:
    """A preset that only some values of a key have."""
    return [_preset(kind, name)] if (preset_folder() / kind / f"{name}.yaml").is_file() else []


def _ablation(name: str) -> list[DictConfig]:
    """The settings of an ablation, after those of the ablation that it builds on.

    The key ``ablation`` in the file of an ablation names the one that it builds on.
    """
    if name == "none":
        return []
    preset = _preset("ablation", name)
    return [*_ablation(preset.pop("ablation", "none")), preset]


def _read(path: Path) -> DictConfig:
    """Read a file. Its keys may be nested in sections, or dotted as on the command line."""
    try:
        text = path.read_text(encoding="utf-8")
        node, written = OmegaConf.create(text), yaml.load(text, yaml.BaseLoader) or {}
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
    # References are not resolved yet, because they may name keys of other files.
    flat = _flat(node)
    flat, changes = present_names(_keep_texts_as_written(flat, flatten(written)))
    _check_keys(flat, str(path))
    if changes:
        warn_about_renamed(path, "; ".join(changes))
    return _nested(flat)


def _nested(flat: Mapping[str, Any]) -> DictConfig:
    """Dotted keys as nested keys: ``{"env.repeat": 2}`` gives ``{"env": {"repeat": 2}}``."""
    nested = OmegaConf.create()
    for key, value in flat.items():
        OmegaConf.update(nested, key, value)
    _correct_types(nested)
    return nested


@cache  # Each file gives one warning, even if it is read several times.
def warn_about_renamed(path: Path, changes: str) -> None:
    """Log one warning about the earlier names that a file uses."""
    log.warning("%s uses names of an earlier version: %s.", path, changes)


def _parse(item: str) -> DictConfig:
    """Parse an override ``key.sub=value``."""
    if "=" not in item:
        raise UserError(f"{item!r} is neither a file nor an override of the form key=value.")
    key, _, text = item.partition("=")
    if _is_text(key):  # not YAML, which would change many texts
        return _from_user({key: text}, item)
    try:
        node = OmegaConf.from_dotlist([item])
    except (YAMLError, ValueError, OmegaConfBaseException) as error:
        raise UserError(f"The override {item!r} cannot be parsed.") from error
    return _from_user(_flat(node), item)


def _from_mapping(settings: Mapping[str, Any]) -> DictConfig:
    return _from_user(flatten(settings), "the configuration")


def _from_user(flat: Mapping[str, Any], source: str) -> DictConfig:
    """Nested settings from keys that the user types now. Keys of earlier versions are errors."""
    for key in flat:
        if key in RENAMED:
            raise UserError(f"{key} in {source} has another name now: {RENAMED[key]}.")
    _check_keys(flat, source)
    return _nested(flat)


def _check_keys(flat: Mapping[str, Any], source: str) -> None:
    """Raise a UserError, with suggestions, if a key is unknown or is a section."""
    defaults = _defaults()
    sections = schema_sections()
    for key in flat:
        if key in sections:
            raise UserError(f"{key} in {source} is a section: set its keys, {key}.<key>=<value>.")
        if key not in defaults:
            raise UserError(unknown_key(key, source))


def unknown_key(key: str, source: str) -> str:
    """The message for an unknown key, with the nearest keys as suggestions."""
    defaults = _defaults()
    name = key.rsplit(".", 1)[-1]
    same_name = [k for k in defaults if k.rsplit(".", 1)[-1] == name]
    similar = difflib.get_close_matches(key, defaults, 1, 0.6)
    # A key without a section may be a key with this name in any section.
    suggestions = (similar or same_name) if "." in key else (same_name or similar)
    hint = f"; did you mean {' or '.join(map(repr, suggestions))}?" if suggestions else "."
    return f"Unknown key {key!r} in {source}{hint}"


def _is_text(key: str) -> bool:
    """Whether the values of a key, which may have its earlier name, are texts."""
    return isinstance(_defaults().get(RENAMED.get(key, key)), str)


def _keep_texts_as_written(flat: Mapping[str, Any], written: Mapping[str, Any]) -> dict[str, Any]:
    """Replace the values of text keys in ``flat`` by the text that the user wrote.

    YAML would read ``off`` as false, 1.10 as 1.1 and 12:30 as a number.
    """
    return {
        key: written[key] if _is_text(key) and isinstance(written.get(key), str) else value
        for key, value in flat.items()
    }


def _correct_types(node: DictConfig) -> None:
    """Convert values that YAML reads as another type, such as 1e6 (a float) for an integer."""
    defaults = _defaults()
    for key, value in _flat(node).items():
        if "off" in bounds_of(key).choices and str(value).lower() in SWITCH_WORDS:
            OmegaConf.update(node, key, SWITCH_WORDS[str(value).lower()])
        if isinstance(value, float) and value.is_integer() and type(defaults[key]) is int:
            OmegaConf.update(node, key, int(value))


@cache
def _defaults() -> Mapping[str, Any]:
    """Every dotted key and its default."""
    return MappingProxyType(_flat(_schema()))


@cache  # A merge copies the schema, so that the cached one does not change.
def _schema() -> DictConfig:
    schema: DictConfig = OmegaConf.structured(Config)
    _make_writable(schema)
    return schema


def _make_writable(node: DictConfig) -> None:
    """Allow merging. OmegaConf makes nodes of frozen dataclasses read-only."""
    OmegaConf.set_readonly(node, False)
    for key in node:
        if isinstance(node[key], DictConfig):
            _make_writable(node[key])


def _merge(nodes: Sequence[DictConfig]) -> DictConfig:
    """Merge nodes. Later values win. References are resolved."""
    try:
        merged = cast(DictConfig, OmegaConf.merge(*nodes))
        OmegaConf.resolve(merged)  # Here an error can still name the key of a bad reference.
        return merged
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0].rstrip(".")
        key = f" for {error.full_key!r}" if error.full_key else ""
        raise UserError(f"Wrong value{key}: {reason}.") from error


def _to_config(merged: DictConfig) -> Config:
    """Check all values, choose the run folder if none is set, and freeze the configuration."""
    flat = _flat(merged)
    check(flat)
    if not flat["run_dir"]:
        task = _task_name(flat["task"])
        ablation = "" if flat["ablation"] == "none" else f"-{flat['ablation']}"
        merged.run_dir = f"runs/{task}-{flat['obs']}-{flat['size']}{ablation}-s{flat['seed']}"
    return cast(Config, OmegaConf.to_object(merged))
