"""YAML files of settings, read within bounds.

Any text gives plain values or one `UserError`. Scalars stay texts as they are written, because the
key decides their type: YAML would read ``off`` as false, 1.10 as 1.1 and 12:30 as a number.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import yaml

from latentplan.types import UserError, shown

MAX_BYTES = 2**17  # about twenty times the size of a configuration with all keys
MAX_DEPTH = 20
MAX_NODES = 10_000  # of the text with all its aliases expanded


def read_mapping(path: Path, kind: str) -> dict[str, Any]:
    """Read a file that holds a mapping. An empty file is an empty mapping.

    Args:
        path: the file.
        kind: the name of such a file in messages, for example ``configuration``.

    Returns:
        Keys and values: dictionaries, lists and texts.

    Raises:
        UserError: the file cannot be read, or does not hold a mapping. The message names the file.
    """
    name = f"The {kind} {shown(str(path), quoted=False)}"
    try:
        text = _content(path).decode("utf-8-sig")
    except OSError as error:
        hint = "" if path.suffix else f" (overrides are written key=value, a task as task={path})"
        raise UserError(f"{name} cannot be read: {error.strerror}{hint}.") from error
    except ValueError as error:  # UnicodeError is one, and so is a refused path or file
        raise UserError(f"{name} cannot be read: {error}.") from error
    value = parse(text, name)
    if value in ("", None):
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{name} is not a mapping of keys to values.")
    return value


def _content(path: Path) -> bytes:
    """The bytes of a regular file.

    Raises:
        OSError: the system cannot open or read it.
        ValueError: it is not a regular file, or is too large.
    """

    # Opening a pipe without a writer would wait for ever without this flag.
    def open_at_once(name: str, flags: int) -> int:
        return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))

    with open(path, "rb", opener=open_at_once) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("it is not a regular file")
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES} bytes")
    return content


def parse(text: str, name: str) -> Any:
    """The value of a YAML text: dictionaries, lists and texts; None if the text is empty.

    Args:
        text: one YAML document.
        name: the subject of the message.

    Raises:
        UserError: the text is not valid YAML, uses tags, or is too large or nested too deeply.
    """
    try:
        return _Document(text).value()
    except Exception as error:  # besides its own errors, PyYAML raises those of int() and chr()
        reason = shown(" ".join(str(error).split()).rstrip("."), 300, quoted=False)
        raise UserError(f"{name} is not valid YAML: {reason}.") from error


class Quoted(str):
    """A text that is in quotes, so that it stays a text where the key does not decide the type."""


class _Document:
    """One YAML document. Its bounds are checked while it is read, before anything is expanded."""

    def __init__(self, text: str) -> None:
        # Only the parser of PyYAML is used: it makes no objects and does not recurse.
        self._events = yaml.parse(text, Loader=yaml.SafeLoader)
        self._anchors: dict[str, tuple[Any, int]] = {}  # complete values and their nodes
        self._nodes = 0

    def value(self) -> Any:
        """The value of the document.

        Raises:
            ValueError: a bound is exceeded.
            yaml.YAMLError: the text is not YAML.
        """
        next(self._events)  # the start of the stream
        if isinstance(next(self._events), yaml.StreamEndEvent):
            return None
        value = self._read(next(self._events), 0)
        next(self._events)  # the end of the document
        if not isinstance(next(self._events), yaml.StreamEndEvent):
            raise ValueError("it holds more than one document")
        return value

    def _read(self, event: Any, depth: int) -> Any:
        """The value that begins with ``event``."""
        before = self._nodes
        self._count(1)
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in self._anchors:  # also inside the value that it would repeat
                raise ValueError(f"the alias *{event.anchor} stands for no complete value")
            value, nodes = self._anchors[event.anchor]
            self._count(nodes)
            return value
        if event.tag is not None:
            raise ValueError(f"the tag {event.tag} is not accepted")
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")
        if isinstance(event, yaml.ScalarEvent):
            value = event.value if event.style is None else Quoted(event.value)
        elif isinstance(event, yaml.SequenceStartEvent):
            value = []
            while not isinstance(item := next(self._events), yaml.SequenceEndEvent):
                value.append(self._read(item, depth + 1))
        else:
            value = self._mapping(depth)
        if event.anchor is not None:
            self._anchors[event.anchor] = value, self._nodes - before
        return value

    def _mapping(self, depth: int) -> dict[str, Any]:
        own: dict[str, Any] = {}
        inherited: dict[str, Any] = {}
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            if not isinstance(event, yaml.ScalarEvent):
                raise ValueError("a key is not a plain text")
            key = self._read(event, depth + 1)
            value = self._read(next(self._events), depth + 1)
            if key == "<<":  # YAML's merge key: the mappings behind it have less precedence
                for mapping in value if isinstance(value, list) else [value]:
                    if not isinstance(mapping, dict):
                        raise ValueError("the value of << is not a mapping")
                    inherited = mapping | inherited
            elif key in own:
                raise ValueError(f"the key {shown(key)} occurs twice")
            else:
                own[key] = value
        return inherited | own

    def _count(self, nodes: int) -> None:
        self._nodes += nodes
        if self._nodes > MAX_NODES:
            raise ValueError(f"it has more than {MAX_NODES} values, aliases included")
