"""Values of keys: their conversion to the types of the schema, and references between keys."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from functools import cache
from numbers import Integral, Real
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from latentplan.config.validation import bounds_of, schema_fields
from latentplan.config.yaml_text import Quoted
from latentplan.types import UserError, shown

MAX_TEXT = 2000  # characters
TRUE, FALSE = ("true", "yes", "on", "y", "1"), ("false", "no", "off", "n", "0")
NULL = ("", "~", "null")
SWITCH_WORDS = {"false": "off", "true": "on"}  # other spellings of the choices off and on
REFERENCE = re.compile(r"\$\{([^{}]*)\}")
MAX_REFERENCES = 20  # of all texts: with them a text grows at most a thousandfold


def convert(key: str, value: object) -> Any:
    """Convert a value to the type of its key.

    Args:
        key: a key of the schema.
        value: a text as it was typed or written, or a Python value.

    Raises:
        UserError: the value has another type. The message names the key.
    """
    if isinstance(value, str) and len(value) > MAX_TEXT:
        raise UserError(f"{key} has {len(value)} characters: at most {MAX_TEXT} are accepted.")
    kind = _kinds()[key]
    if kind.endswith("| None") and (value is None or str(value).lower() in NULL):
        return None
    convert_to, description = CONVERSIONS[kind.removesuffix(" | None")]
    try:
        converted = convert_to(value)
    except (ValueError, OverflowError):  # of int() and float()
        converted = None
    if converted is None:
        raise UserError(f"{key} must be {description}, not {shown(value)}.")
    if "off" in bounds_of(key).choices:
        return SWITCH_WORDS.get(str(converted).lower(), converted)
    return converted


@cache
def _kinds() -> dict[str, str]:
    """The type of each key, as the schema writes it."""
    return {key: str(field.type) for key, field in schema_fields()}


def _integer(value: object) -> int | None:
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d[\d_]*", value.strip()):
        return int(value)
    if isinstance(value, str) and re.fullmatch(r"[+-]?0[xob]\w+", value.strip(), re.IGNORECASE):
        return int(value, 0)
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    number = _number(value)  # 1e6 is an integer too
    return int(number) if number is not None and number.is_integer() else None


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, str | Real):
        return None
    return float(value)


def _switch(value: object) -> bool | None:
    if not isinstance(value, str | bool | Integral):
        return None
    word = str(value).strip().lower()
    return True if word in TRUE else False if word in FALSE else None


def _text(value: object) -> str | None:
    if not isinstance(value, str | Real | os.PathLike):
        return None
    text = str(value)
    # Control characters break messages and paths. A config.yaml cannot hold half a UTF-16 pair.
    if any(character < " " or "\ud800" <= character <= "\udfff" for character in text):
        return None
    return text


def _named_values(value: object) -> dict[str, Any] | None:
    """A mapping of names to numbers, texts, truth values, nulls, and lists of them."""
    if not isinstance(value, Mapping):
        return {} if value is None or value == "" else None
    if not all(isinstance(name, str) and name.isidentifier() for name in value):
        return None
    if not all(map(_is_plain, value.values())):
        return None
    return dict(value)


def _is_plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, str):
        return len(value) <= MAX_TEXT and _text(value) is not None
    # NaN is not equal to itself, so that a run could not be continued.
    return value is None or (isinstance(value, bool | int | float) and value == value)


def typed(value: Any) -> Any:
    """The value that a text of YAML stands for, where no key decides its type.

    Args:
        value: dictionaries, lists and texts, as `yaml_text.parse` gives them.
    """
    if isinstance(value, dict):
        return {name: typed(x) for name, x in value.items()}
    if isinstance(value, list):
        return [typed(x) for x in value]
    if not isinstance(value, str) or isinstance(value, Quoted) or len(value) > MAX_TEXT:
        return str(value) if isinstance(value, Quoted) else value
    word = value.lower()
    if word in NULL:
        return None
    if word in ("true", "false"):
        return word == "true"
    if re.fullmatch(r"[+-]?[0-9]+", word):
        return int(word)
    if re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?|[+-]?\.inf", word):
        return float(word.replace(".inf", "inf"))
    return value


CONVERSIONS: dict[str, tuple[Callable[[object], Any], str]] = {
    "int": (_integer, "an integer"),
    "float": (_number, "a number"),
    "bool": (_switch, "true or false"),
    "str": (_text, "a text on one line"),
    "dict[str, Any]": (_named_values, "names with plain values, as in {size: 5}"),
}


def expand_home(key: str, value: Any) -> Any:
    """Replace a leading ``~`` in the value of a key that is a path, as a shell does."""
    return os.path.expanduser(value) if bounds_of(key).path else value


def resolve_references(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Replace each ``${section.key}`` by the value of that key, with OmegaConf.

    Only references to keys reach OmegaConf, and few of them: its resolvers read the environment,
    and references of references can grow without limit.

    Args:
        flat: the values of all keys, by dotted key.

    Raises:
        UserError: a reference names no key, leads back to itself, or there are too many.
    """
    texts = {key: x for key, x in flat.items() if isinstance(x, str) and "${" in x}
    if not texts:
        return dict(flat)
    for key, text in texts.items():
        names = REFERENCE.findall(text)
        for name in names:
            if name not in flat:
                raise UserError(f"The reference {shown('${' + name + '}')} of {key} names no key.")
        if text.count("${") != len(names):
            raise UserError(f"{key} has a reference that is not a key: {shown(text)}.")
    if sum(text.count("${") for text in texts.values()) > MAX_REFERENCES:
        raise UserError(f"The configuration has more than {MAX_REFERENCES} references.")
    try:
        tree = OmegaConf.create({})
        for key, value in flat.items():
            OmegaConf.update(tree, key, value)
        return {key: OmegaConf.select(tree, key) if key in texts else flat[key] for key in flat}
    except (OmegaConfBaseException, RecursionError) as error:
        raise UserError(f"The references of {' and '.join(texts)} cannot be resolved.") from error
