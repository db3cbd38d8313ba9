"""Explanations of the configuration: its keys by the schema, its presets by their files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import MISSING, Field
from pathlib import Path
from typing import Any

import yaml

from latentplan.config.loading import preset_folder, unknown_key
from latentplan.config.renamed import RENAMED
from latentplan.config.schema import Bounds
from latentplan.config.tasks import DMC_TASKS, DUMMY_TASKS
from latentplan.config.validation import schema_fields, schema_sections
from latentplan.types import UserError

KINDS = {"tasks": "task", "sizes": "size", "ablations": "ablation", "studies": "study"}


def explain(names: Sequence[str]) -> str:
    """Meaning, type, default and bounds of keys, one paragraph each.

    Args:
        names: keys or sections; empty: all keys.

    Raises:
        UserError: there is no such key or section. The message names the nearest one, or the
            present name of a key of an earlier version.
    """
    known = dict(schema_fields())
    chosen: list[str] = []
    for name in names:
        if name in RENAMED:
            raise UserError(f"{name} has another name now: {RENAMED[name]}.")
        matches = [key for key in known if key == name or key.startswith(f"{name}.")]
        if not matches:
            raise UserError(unknown_key(name, "the schema"))
        chosen += matches
    paragraphs = []
    for key in chosen or known:
        field = known[key]
        default, values = _value(field.default), describe_bounds(field)
        meaning = field.metadata["meaning"]
        paragraphs.append(f"{key}\n  {meaning}\n  {field.type}, default {default}; {values}")
    return "\n\n".join(paragraphs)


def describe_bounds(field: Field[Any]) -> str:
    """The accepted values of a key in words."""
    bounds: Bounds = field.metadata["bounds"]
    if bounds.choices:
        return f"one of {', '.join(bounds.choices)}"
    if field.default is MISSING:
        return "names with plain values"
    if isinstance(field.default, bool):
        return "true or false"
    if isinstance(field.default, str):
        return "any text"
    parts = []
    if bounds.above is not None:
        parts.append(f"more than {bounds.above}")
    elif bounds.at_least > float("-inf"):
        parts.append(f"at least {bounds.at_least}")
    if bounds.at_most is not None:
        parts.append(f"at most {bounds.at_most}")
    return ", ".join(parts) or "any number"


def _value(default: Any) -> str:
    if default is MISSING:
        return "{}"
    if default is None:
        return "null"
    if isinstance(default, bool):
        return str(default).lower()
    return repr(default) if default == "" else str(default)


def markdown() -> str:
    """The page ``docs/configuration.md``: a table of keys per section."""
    titles = {name: section.__doc__ for name, section in schema_sections().items()}
    lines = [
        "# Configuration reference",
        "",
        "<!-- tools/configuration_reference writes this page from latentplan/config/schema.py. -->",
        "",
        "Values come from the defaults below, `configs/default.yaml`, the presets of task, size "
        "and ablation, files on the command line, and `key=value`.",
        "Later ones win.",
        "`latentplan config key=value ...` prints the result, and "
        "`latentplan config --explain KEY` prints a row of this page.",
    ]
    for section, title in {"": None, **titles}.items():
        lines += ["", f"## `{section}`: {title}" if section else "## Top level", ""]
        lines += ["| key | type | default | accepts | meaning |", "|---|---|---|---|---|"]
        for key, field in schema_fields():
            if key.rpartition(".")[0] == section:
                cells = (
                    *(f"`{key}`", field.type, f"`{_value(field.default)}`"),
                    *(describe_bounds(field), field.metadata["meaning"]),
                )
                texts = [str(cell).replace("|", "\\|") for cell in cells]
                lines.append(f"| {' | '.join(texts)} |")
    return "\n".join(lines) + "\n"


def listing(kind: str) -> str:
    """The names of a kind of preset, each with the first sentence of its file.

    Args:
        kind: ``tasks``, ``sizes``, ``ablations`` or ``studies``.
    """
    if kind == "tasks":
        suite = [f"  {domain}_{task}" for domain, tasks in DMC_TASKS.items() for task in tasks]
        dummy = [f"  dummy:{name}" for name in DUMMY_TASKS]
        return "\n".join(["tasks", *suite, *dummy, "  gym:ID  (any Gymnasium environment)"])
    paths = sorted((preset_folder() / KINDS[kind]).glob("*.yaml"))
    width = max(len(path.stem) for path in paths)
    return "\n".join([kind, *(f"  {x.stem:{width}}  {_first_sentence(x)}" for x in paths)])


def _first_sentence(path: Path) -> str:
    """The first sentence of the comment at the top of a file, or else the settings in the file."""
    text = path.read_text(encoding="utf-8")
    words = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        words.append(line.removeprefix("#").strip())
    comment = " ".join(words)
    if comment:
        return re.split(r"(?<=[.?!]) ", comment, maxsplit=1)[0]
    content = yaml.safe_load(text) or {}
    return ", ".join(f"{key}: {value}" for key, value in content.items())
