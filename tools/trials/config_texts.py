"""Random configurations as texts: keys and values of right and wrong kinds, and odd YAML."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path

import yaml

from latentplan.config.validation import bounds_of, schema_fields, schema_sections

ODD_TEXTS = (
    *("", " ", "~", "null", "None", "true", "off", "yes", "-", "0x1F", "0o17", "1_000", "1e6"),
    *("nan", "NaN", ".nan", "inf", "-inf", ".inf", "-.inf", "1e400", "-1e400", "1e-400", "1e308"),
    *("0", "-1", "-0.0", "3.5", "9" * 400, "-" + "9" * 5000, "1" + "0" * 19, "2e308", "1,5", "٣"),
    *("${seed}", "${task}", "${run_dir}", "${env.repeat}", "${", "${}", "${a.b.c}", "$${seed}"),
    *("${oc.env:HOME}", "${seed}${seed}", "${${seed}}", "${env}", "\x00", "\x1b[31m", "a\nb"),
    *("\ud800", "\u2028", "\ufeff", "é", "日本", "🙂", "a" * 3000, "../..", "~/x", "~nobody/x"),
    *("gym:", "dmc:", ":", "gym:a:b:c", "dummy:pixels", "dmc:walker_walk", "walker", "=", "a=b"),
    *("[1, 2]", "{a: 1}", "!!python/object/apply:os.system [id]", "!!timestamp x", "&a [*a]"),
    *("*a", "- 1", "? a", "|", ">", "%", "@", "`", "'", '"', "#", "!!binary x", "2026-01-01"),
    *("%s %d %(a)s", "{0}", "{}", "\\", "\t", "12:30:45", "0b101", "<<", "=", "1e", ".", "..", "/"),
)
DOCUMENTS = (
    *("", "\n", "---\n", "--- \n...\n---\n", "null", "1", "[]", "- a\n- b", "text", "a: b: c"),
    *("{", "}", "[", "a: [", "\t- a", "a: 'b", "%YAML 3.0\n---\na: 1", "\x00", "\ufeffseed: 1"),
    *("a: &a [*a, *a]", "seed: !!python/name:os.system", "seed: !!set {1, 2}", "? [a, b]\n: 1"),
    *("seed: 1\nseed: 2", "seed:\n  seed: 1", "env: null", "env: 3", "env: []", "env: {repeat: 2}"),
    *("<<: {seed: 1}", "&b seed: 1", "1: 2", "true: 1", "null: 1", "[1]: 2", "{a: 1}: 2", "1.5: 1"),
    *("seed: 2026-01-01 00:00:00", "seed: !!binary aGFsbG8=", "env.repeat: {a: 1}", "'': 1"),
)
STRANGE = 0.15  # fraction of values that are taken for another key


def items(rng: random.Random, folder: Path) -> list[str]:
    """The arguments of a command line. Files are written into ``folder``."""
    kinds: Sequence[Callable[[random.Random, Path], list[str]]] = (
        _overrides,
        _overrides,
        _plausible,
        _file_of_keys,
        _document,
        _bytes,
        _deep_or_large,
    )
    result = rng.choice(kinds)(rng, folder)
    if rng.random() < 0.1:
        result += _overrides(rng, folder)
    return result


def _overrides(rng: random.Random, folder: Path) -> list[str]:
    return [f"{_key(rng)}={_value(rng, _key(rng))}" for _ in range(rng.randint(1, 4))]


def _plausible(rng: random.Random, folder: Path) -> list[str]:
    keys = rng.sample(_keys(), rng.randint(1, 5))
    return [f"{key}={_valid(rng, key)}" for key in keys]


def _file_of_keys(rng: random.Random, folder: Path) -> list[str]:
    """A YAML file, nested or dotted, of values with their types."""
    tree: dict[str, object] = {}
    for _ in range(rng.randint(1, 8)):
        key = _key(rng)
        text = _value(rng, key)
        value: object = rng.choice([text, text, 1, -1, 2**70, 1.5, None, True, [text], {text: 1}])
        section, dot, name = key.partition(".")
        if dot and rng.random() < 0.6 and isinstance(tree.setdefault(section, {}), dict):
            tree[section][name] = value  # type: ignore[index]
        else:
            tree[key] = value
    return _written(
        folder,
        yaml.safe_dump(tree, allow_unicode=rng.random() < 0.5).encode("utf-8", "surrogatepass"),
    )


def _document(rng: random.Random, folder: Path) -> list[str]:
    """An odd document, or one with odd values behind real keys."""
    if rng.random() < 0.5:
        return _written(folder, rng.choice(DOCUMENTS).encode("utf-8", "surrogatepass"))
    lines = [f"{_key(rng)}: {_value(rng, _key(rng))}" for _ in range(rng.randint(1, 5))]
    return _written(folder, "\n".join(lines).encode("utf-8", "surrogatepass"))


def _bytes(rng: random.Random, folder: Path) -> list[str]:
    """A valid document with random bytes changed, or nothing but random bytes."""
    if rng.random() < 0.3:
        return _written(folder, rng.randbytes(rng.randint(0, 300)))
    lines = [f"{key}: {_valid(rng, key)}" for key in rng.sample(_keys(), 5)]
    data = bytearray("\n".join(lines).encode())
    for _ in range(rng.randint(1, 5)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    return _written(folder, bytes(data))


def _deep_or_large(rng: random.Random, folder: Path) -> list[str]:
    """Nesting, aliases that multiply, and long texts, in a file or behind a section."""
    n = rng.choice((1, 5, 19, 21, 100, 3000))
    opened, closed = rng.choice((("[", "]"), ("{a: ", "}"), ("- ", "")))
    names = "abcdefghij"
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{this}: &{this} [{', '.join([f'*{last}'] * 9)}]\n" for last, this in pairwise(names)
    )
    text = rng.choice(
        (
            f"{_key(rng)}: {opened * n}1{closed * n}",
            bomb,
            f"{_key(rng)}: {'x' * (n * 50)}",
            "\n".join(f"k{i}: {i}" for i in range(n * 4)),
            f"run_dir: {'${task}' * min(n, 100)}",
            "\n".join(f"{' ' * i}a:" for i in range(min(n, 300))),
        )
    )
    if rng.random() < 0.3:
        return [f"{rng.choice(list(schema_sections()))}={text}"]
    return _written(folder, text.encode())


def _written(folder: Path, data: bytes) -> list[str]:
    path = folder / "random.yaml"
    path.write_bytes(data)
    return [str(path)]


@cache
def _keys() -> list[str]:
    return [key for key, _ in schema_fields()]


def _key(rng: random.Random) -> str:
    """A key, and sometimes a section, a misspelled key or an odd text."""
    draw = rng.random()
    if draw < 0.8:
        return rng.choice(_keys())
    if draw < 0.87:
        return rng.choice(list(schema_sections()))
    if draw < 0.94:
        key = list(rng.choice(_keys()))
        key[rng.randrange(len(key))] = rng.choice("abcxyz._ =")
        return "".join(key)
    return rng.choice(ODD_TEXTS)


def _value(rng: random.Random, key: str) -> str:
    """An odd text, or a valid value, which may be meant for another key."""
    if rng.random() < 0.5:
        return rng.choice(ODD_TEXTS)
    known = key if key in _keys() and rng.random() > STRANGE else rng.choice(_keys())
    return _valid(rng, known)


def _valid(rng: random.Random, key: str) -> str:
    """A value of the type of a key, and mostly within its bounds."""
    bounds, kind = bounds_of(key), str(dict(schema_fields())[key].type)
    if bounds.choices:
        return rng.choice(bounds.choices)
    if kind.startswith("bool"):
        return rng.choice(("true", "false"))
    least = max(bounds.at_least, -10.0) if bounds.above is None else bounds.above
    most = bounds.at_most if bounds.at_most is not None else rng.choice((1.0, 64.0, 1e4, 1e12))
    number = rng.uniform(least, max(least, most))
    if kind.startswith("int"):
        return str(int(number))
    if kind.startswith("float"):
        return rng.choice((f"{number}", f"{number:.3g}", f"{number:e}"))
    return rng.choice(("auto", "none", "tiny", "cpu", "dmc:walker_walk", "dummy:pixels", "runs/x"))
