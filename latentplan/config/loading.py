"""Loading of the configuration: YAML files and ``key.sub=value`` overrides of the schema.

The sources are, in this order: the defaults of the dataclasses in ``schema.py``,
``configs/default.yaml``, ``configs/task/<task or domain>.yaml``, ``configs/size/<size>.yaml`` (the
other way round for Gymnasium tasks), ``configs/obs/<obs>.yaml`` where there is one,
``configs/ablation/<ablation>.yaml``, files named on the command line, overrides. A later source
replaces values of earlier ones. The result is frozen.

Every source is a flat mapping of dotted keys to values. Values are texts until all sources are
merged; then the schema gives each its type.
"""

from __future__ import annotations

import difflib
import logging
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from latentplan.config import yaml_text
from latentplan.config.renamed import RENAMED, present_names
from latentplan.config.schema import Config
from latentplan.config.tasks import NO_TASK, parse_task
from latentplan.config.validation import check, schema_sections
from latentplan.config.values import convert, expand_home, resolve_references, typed
from latentplan.config.yaml_text import Quoted
from latentplan.runtime import device
from latentplan.types import UserError, shown

log = logging.getLogger("latentplan")
SEAL = "# CRC32 of the lines below: "
MAX_LEVELS = 20  # of nested mappings
NAMED = "env.kwargs"  # the key whose value is a mapping of names that the schema does not know
Flat = dict[str, Any]  # dotted keys and values


def as_config(source: Config | Mapping[str, Any] | Sequence[str]) -> Config:
    """Make a configuration.

    Args:
        source: a `Config`, which is returned unchanged; a mapping whose keys are dotted or nested;
            or files and ``key=value`` items, as on the command line. An item with ``=`` is a file
            if there is a file of that name.

    Raises:
        UserError: as :func:`load`.
    """
    if isinstance(source, Config):
        return source
    if isinstance(source, Mapping):
        return _resolve([_from_user(flatten(source), "the configuration")])
    items = [str(item) for item in source]
    overrides = [x for x in items if "=" in x and not os.path.isfile(os.path.expanduser(x))]
    return load([x for x in items if x not in overrides], overrides)


def load(files: Sequence[str | Path] = (), overrides: Sequence[str] = ()) -> Config:
    """Merge presets, files and ``key.sub=value`` overrides into a frozen configuration.

    Raises:
        UserError: a key is unknown (the message names the nearest one), a value has the wrong type
            or is outside its bounds, or a file cannot be read.
    """
    paths = [Path(os.path.expanduser(name)) for name in files]
    return _resolve([*map(_read, paths), *map(_parse, overrides)])


def _resolve(user: Sequence[Flat]) -> Config:
    """Merge the user's settings with the presets that they choose."""
    base = [_read(preset_folder() / "default.yaml")]
    chosen = _merge([*base, *user])
    size = chosen["size"] if chosen["size"] != "auto" else _default_size(chosen["device"])
    task = task_preset(chosen["task"])
    presets = [_preset("size", size)]
    if task is not None:
        # A size comes after a task of dm_control, because published sizes set the published action
        # repeat of 2. The protocol of a Gymnasium task is the same at every size.
        place = len(presets) if parse_task(chosen["task"])[0] == "gym" else 0
        presets.insert(place, _read(task))
    presets += _optional("obs", chosen["obs"]) + _ablation(chosen["ablation"])
    return _to_config({**_merge([*base, *presets, *user]), "size": size})


def _merge(sources: Sequence[Flat]) -> Flat:
    """The values of all keys. Later sources win. References are replaced."""
    merged: Flat = dict(_defaults())
    for source in sources:
        _add(merged, source)
    resolved = resolve_references(merged)
    return {key: expand_home(key, convert(key, value)) for key, value in resolved.items()}


def _add(flat: Flat, more: Mapping[str, Any]) -> None:
    """Add settings to others, in place. Later ones win; of ``NAMED``, each name by itself."""
    before = flat.get(NAMED)
    flat.update(more)
    if isinstance(before, Mapping) and isinstance(more.get(NAMED), Mapping):
        flat[NAMED] = {**before, **more[NAMED]}


def load_resolved(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read the ``config.yaml`` of a run folder.

    No presets are applied, since the file has all values. They are taken as they are, so that a
    text such as ``${seed}`` or ``~`` means the same on every machine. A warning says when the file
    is not as :func:`to_sealed_yaml` made it, because a damaged digit is still a digit.

    Raises:
        UserError: as :func:`load`, or the file is empty.
    """
    saved = _read(path)
    first, _, rest = path.read_bytes().partition(b"\n")
    if first.startswith(SEAL.encode()) and first != _seal(rest):
        _warn_about_change(path, zlib.crc32(rest))
    if not saved:  # Runs of earlier versions may lack some keys, but no run lacks all.
        raise UserError(f"The configuration {path} is empty.")
    values = {key: convert(key, value) for key, value in {**_defaults(), **saved}.items()}
    given = parse_overrides(overrides)
    values |= {key: expand_home(key, convert(key, value)) for key, value in given.items()}
    return _to_config(values)


def parse_overrides(items: Sequence[str]) -> Flat:
    """The dotted keys and the texts of ``key=value`` items; later ones win.

    Raises:
        UserError: an item has another form, or its key is unknown.
    """
    given: Flat = {}
    for item in items:
        given |= _parse(item)
    return given


def to_yaml(config: Config) -> str:
    """All values of a configuration as YAML, which :func:`load_resolved` reads."""
    tree = asdict(config)
    tree["env"]["kwargs"] = _quoted(tree["env"]["kwargs"])
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=2**16)


class _Dumper(yaml.SafeDumper):
    """Writes a `Quoted` text in quotes."""


_Dumper.add_representer(
    Quoted,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", str(text), style="'"),
)


def _quoted(value: Any) -> Any:
    """A value whose texts are in quotes, because no key says that they are texts."""
    if isinstance(value, dict):
        return {name: _quoted(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [_quoted(x) for x in value]
    return Quoted(value) if isinstance(value, str) else value


def to_override(key: str, value: Any) -> str:
    """The item ``key=value`` for a setting of a YAML file."""
    if key != NAMED:
        return f"{key}={value}"
    tree = _quoted(typed(value))
    text = yaml.dump(tree, Dumper=_Dumper, default_flow_style=True, width=2**16)
    return f"{key}={text.strip()}"


def to_sealed_yaml(config: Config) -> str:
    """:func:`to_yaml`, behind a line with its CRC32."""
    text = to_yaml(config)
    return f"{_seal(text.encode()).decode()}\n{text}"


def _seal(content: bytes) -> bytes:
    return f"{SEAL}{zlib.crc32(content):08x}".encode()


@cache  # one warning for each content of a file
def _warn_about_change(path: Path, crc32: int) -> None:
    log.warning(
        "%s has been edited or damaged since it was written. Its present values are used.", path
    )


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Flat:
    """Nested keys as dotted keys: ``{"env": {"repeat": 2}}`` gives ``{"env.repeat": 2}``.

    The value of ``NAMED`` is a mapping and stays one.

    If a key occurs both nested and dotted, the later value is kept.

    Raises:
        UserError: the mappings are nested more than ``MAX_LEVELS`` deep.
    """
    if prefix.count(".") > MAX_LEVELS:
        raise UserError(f"The key {shown(prefix)} is nested more than {MAX_LEVELS} levels deep.")
    flat: Flat = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if key.startswith(f"{NAMED}."):
            _add(flat, {NAMED: {key.removeprefix(f"{NAMED}."): value}})
        elif isinstance(value, Mapping) and key != NAMED:
            _add(flat, flatten(value, f"{key}."))
        else:
            _add(flat, {key: value})
    return flat


def preset_folder() -> Path:
    """The folder ``configs`` inside the package. In a checkout it is a link to the top folder."""
    return Path(__file__).resolve().parents[1] / "configs"


def task_preset(task: str) -> Path | None:
    """The file in ``configs/task`` for a task or, if there is none, for its domain.

    If several files match, the one with the longest name is used. None if no file matches.
    """
    name = f"{_task_name(task)}_"
    presets = (preset_folder() / "task").glob("*.yaml")
    # A domain ends at a separator: MiniGrid has the tasks MiniGrid-Empty-8x8-v0 and others.
    matching = [
        path for path in presets if name.startswith(path.stem) and name[len(path.stem)] in "_-"
    ]
    return max(matching, key=lambda path: len(path.stem), default=None)


def _task_name(task: str) -> str:
    """A name for a task that can be part of a file name. It is the same for all spellings."""
    suite, name = parse_task(task)
    return name if suite in ("dmc", NO_TASK) else f"{suite}-{name}".replace("/", "-")


def _default_size(device_name: str) -> str:
    if device_name.startswith("cpu"):
        return "cpu"
    return "12m" if device.has_cuda() else "cpu"


def _preset(kind: str, name: str) -> Flat:
    """Read a preset. ``kind`` is the name of a folder of presets."""
    known = _presets(kind)
    if name not in known:
        names = ", ".join(sorted(known))
        raise UserError(f"There is no {kind} {shown(name)}; choose one of: {names}.")
    return _read(known[name])


def _presets(kind: str) -> dict[str, Path]:
    """The presets of a kind by name. A name from a user is looked up, never made into a path."""
    return {path.stem: path for path in (preset_folder() / kind).glob("*.yaml")}


def _optional(kind: str, name: str) -> list[Flat]:
    """A preset that only some values of a key have."""
    return [_preset(kind, name)] if name in _presets(kind) else []


def _ablation(name: str) -> list[Flat]:
    """The settings of an ablation, after those of the ablation that it builds on.

    The key ``ablation`` in the file of an ablation names the one that it builds on.
    """
    if name == "none":
        return []
    preset = _preset("ablation", name)
    return [*_ablation(preset.pop("ablation", "none")), preset]


def _read(path: Path) -> Flat:
    """Read a file. Its keys may be nested in sections, or dotted as on the command line."""
    flat, changes = present_names(flatten(yaml_text.read_mapping(path, "configuration")))
    if NAMED in flat:
        flat[NAMED] = typed(flat[NAMED])
    _check_keys(flat, str(path))
    if changes:
        warn_about_renamed(path, "; ".join(changes))
    return flat


@cache  # Each file gives one warning, even if it is read several times.
def warn_about_renamed(path: Path, changes: str) -> None:
    """Log one warning about the earlier names that a file uses."""
    log.warning("%s uses names of an earlier version: %s.", path, changes)


def _parse(item: str) -> Flat:
    """Parse an override ``key.sub=value``. The value of a section is YAML: ``env={repeat: 2}``."""
    key, equals, value = item.partition("=")
    source = shown(item, quoted=False)
    if not equals:
        raise UserError(f"{source!r} is neither a file nor an override of the form key=value.")
    named = key == NAMED or key.startswith(f"{NAMED}.")
    if key not in schema_sections() and not named:
        return _from_user({key: value}, source)
    flat = flatten({key: yaml_text.parse(value, f"The override {source}")})
    if NAMED in flat:
        flat[NAMED] = typed(flat[NAMED])
    return _from_user(flat, source)


def _from_user(flat: Flat, source: str) -> Flat:
    """Settings that the user types now. Keys of earlier versions are errors."""
    for key in flat:
        if key in RENAMED:
            raise UserError(f"{key} in {source} has another name now: {RENAMED[key]}.")
    _check_keys(flat, source)
    return flat


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
    return f"Unknown key {shown(key)} in {source}{hint}"


@cache
def _defaults() -> Mapping[str, Any]:
    """Every dotted key and its default."""
    return MappingProxyType(flatten(asdict(Config())))


def _to_config(flat: Flat) -> Config:
    """Check all values, choose the run folder if none is set, and freeze the configuration."""
    check(flat)
    if not flat["run_dir"]:
        task = _task_name(flat["task"])
        ablation = "" if flat["ablation"] == "none" else f"-{flat['ablation']}"
        run_dir = f"runs/{task}-{flat['obs']}-{flat['size']}{ablation}-s{flat['seed']}"
        flat = {**flat, "run_dir": run_dir}
    top = {key: value for key, value in flat.items() if "." not in key}
    for name, section in schema_sections().items():
        names = [key for key in flat if key.startswith(f"{name}.")]
        top[name] = section(**{key.removeprefix(f"{name}."): flat[key] for key in names})
    return Config(**top)
