"""Texts of any kind give a configuration or one `UserError`, and never another exception."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from latentplan.cli.main import main
from latentplan.config import yaml_text
from latentplan.config.loading import as_config, flatten, load, load_resolved, to_yaml
from latentplan.config.schema import Config
from latentplan.config.validation import schema_fields
from latentplan.config.values import MAX_TEXT
from latentplan.study.matrix import jobs
from latentplan.study.study_file import read_study
from latentplan.types import UserError

BOMB = "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10 if i else ['x'] * 10)}]\n" for i in range(12)
)
DEEP_ALIASES = "a0: &a0 {x: 1}\n" + "".join(
    f"a{i}: &a{i} {{x: *a{i - 1}}}\n" for i in range(1, 999)
)
TEXTS = {
    "timestamp tag": "seed: !!timestamp x",
    "python tag": "seed: !!python/object/apply:os.system [ls]",
    "binary": "run_dir: !!binary aGVsbG8=",
    "bad binary": "run_dir: !!binary x",
    "set": "env: !!set {repeat}",
    "integer tag": "seed: !!int",
    "own tag": "seed: !x 3",
    "deep lists": "seed: " + "[" * 5000 + "]" * 5000,
    "deep mappings": "{a: " * 5000 + "1" + "}" * 5000,
    "deep blocks": "".join(" " * i + f"a{i}:\n" for i in range(300)),
    "bomb": BOMB,
    "deep aliases": DEEP_ALIASES,
    "cyclic list": "task: &a [*a]",
    "cyclic mapping": "env: &a {repeat: *a}",
    "cyclic merge": "env: &a {<<: *a}",
    "unknown alias": "seed: *a",
    "key of a list": "? [a, b]\n: 1",
    "key of a mapping": "? {a: b}\n: 1",
    "alias as a key": "task: &a seed\n*a : 3",
    "number as a key": "1: 2",
    "nothing as a key": "~: 2\n: 3",
    "duplicate": "seed: 1\nseed: 2",
    "two documents": "seed: 1\n---\nseed: 2",
    "huge integer": f"seed: {'9' * 5000}",
    "huge hexadecimal": f"seed: 0x{'f' * 1900}",
    "long base 60": "seed: " + ":".join(["59"] * 500),
    "long text": f"run_dir: {'x' * 5000}",
    "long preset": f"size: {'x' * 300}",
    "preset elsewhere": "size: ../task/cartpole",
    "large character": 'run_dir: "\\U00110000"',
    "half a pair": 'run_dir: "\\ud800"',
    "control character": 'run_dir: "a\\0b"',
    "two lines": 'run_dir: "a\\nb"',
    "value tag": "seed: =",
    "large version": "%YAML 99999.9\n---\nseed: 1",
    "endless reference": "seed: ${steps}\nsteps: ${seed}",
    "own reference": "seed: ${seed}",
    "growing references": "run_dir: ${task}${task}\ntask: " + "${device}" * 300 + "\ndevice: "
    "${env.module}${env.module}\nenv.module: " + "x" * 900,
    "resolver": "run_dir: ${oc.env:HOME}",
    "open reference": "seed: ${seed",
    "missing value": "seed: ???",
    "list of settings": "- 1",
    "scalar": "seed",
}


def load_file(path: Path) -> Config:
    return load([path])


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("read", [load_file, read_study])
def test_a_text_that_is_no_configuration_is_one_sentence_at_once(
    tmp_path: Path, read: Callable[[Path], object], text: str
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    begin = time.monotonic()
    with pytest.raises(UserError) as caught:
        read(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_a_damaged_saved_configuration_is_one_sentence_or_is_read(
    tmp_path: Path, text: str
) -> None:
    """Presets and references are not looked up in a saved one, so that more texts are accepted."""
    path = tmp_path / "config.yaml"
    path.write_text(text)
    try:
        assert isinstance(load_resolved(path), Config)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 700


@pytest.mark.parametrize(
    "item",
    [
        *("[=1", "[x=1", "=", "=1", "a.=1", ".=1", "task=&a [*a]", "seed={: 2}", "env=[", "env={"),
        *("env={a: {b: 1}}", "env=&a [*a]", "seed=!!timestamp x", "task=*a", "seed=${seed}"),
        *("env.repeat=" + "[" * 3000, "size=" + "a" * 300, "ablation=" + "a" * 5000),
        *(
            "task=" + "a" * 100_000,
            "a" * 100_000 + "=1",
            "seed=" + "9" * 5000,
            "steps=0x" + "f" * 9999,
        ),
        *("size=../task/cartpole", "run_dir=a\0b", "run_dir=\udcff", "seed=1e999", "seed=٣x"),
    ],
    ids=lambda item: ascii(item[:30]),
)
def test_an_override_that_cannot_be_is_one_sentence(item: str) -> None:
    with pytest.raises(UserError) as caught:
        load([], [item])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700


def test_python_values_that_cannot_be_are_errors() -> None:
    endless: dict[str, object] = {}
    endless["env"] = endless
    for settings in (
        endless,
        *({"seed": x} for x in (10**5000, None, True, [1], b"1", object(), float("nan"), 1.5)),
        {"train.ratio": 10**400},
        {"run_dir": b"runs"},
        {1: 2},
        {None: 2},
        {("a",): 2},
    ):
        with pytest.raises(UserError):
            as_config(settings)
    assert as_config({"run_dir": Path("a/b"), "steps": 1e6}).run_dir == "a/b"


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "large", "not UTF-8", "UTF-16"])
@pytest.mark.parametrize("read", [load_file, load_resolved, read_study])
def test_a_file_that_holds_no_text_is_one_sentence_at_once(
    tmp_path: Path, read: Callable[[Path], object], kind: str
) -> None:
    path = tmp_path / "mine.yaml"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        content = {"large": b"# " + b"x" * 2**20, "not UTF-8": b"seed: \xff", "UTF-16": None}[kind]
        path.write_bytes(content or "seed: 1".encode("utf-16"))
    with pytest.raises(UserError, match=r"mine\.yaml cannot be read"):
        read(path)


def test_aliases_merges_and_a_byte_order_mark_are_read(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "\ufeffworld: {deter: 64}\nenv: {<<: [{repeat: 3}, {repeat: 4, num_envs: 2}]}\n"
        "behavior.units: &n 48\nworld.units: *n\n",
        encoding="utf-8",
    )
    loaded = load([path], ["device=cpu"])
    assert (loaded.world.deter, loaded.world.units, loaded.behavior.units) == (64, 48, 48)
    assert (loaded.env.repeat, loaded.env.num_envs) == (3, 2)
    assert load([], ["env={repeat: 7}"]).env.repeat == 7


def test_no_reference_of_a_saved_configuration_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LATENTPLAN_SECRET", "secret")
    path = tmp_path / "config.yaml"
    for text in ("${oc.env:LATENTPLAN_SECRET}", "${seed}", "~/runs", "${", "???", "\\${seed}"):
        path.write_text(
            to_yaml(load([], ["run_dir=here"])).replace("run_dir: here", f"run_dir: '{text}'")
        )
        saved = load_resolved(path)
        assert saved.run_dir == text
        path.write_text(to_yaml(saved))
        assert load_resolved(path) == saved
    path.write_text(path.read_text().replace("seed: 0", "seed: ${steps}"))
    with pytest.raises(UserError, match="seed must be an integer"):
        load_resolved(path)


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e6", 10**6), ("1_000", 1000), ("0x10", 16), (" 7 ", 7), ("+7", 7), ("7.0", 7), ("010", 10)],
)
def test_integers_may_be_written_in_several_ways(text: str, value: int) -> None:
    assert load([], [f"steps={text}"]).steps == value


@pytest.mark.parametrize("text", ["a: b # c", "é", "'", "-", "null", "1e5", "=", "x" * MAX_TEXT])
def test_every_text_survives_saving(tmp_path: Path, text: str) -> None:
    loaded = load([], [f"run_dir={text}"])
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(loaded), encoding="utf-8")
    assert load_resolved(path) == loaded and loaded.run_dir == text


# --- names of files and folders -------------------------------------------------------------


def test_a_file_that_exists_may_have_an_equals_sign_in_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=1e-4,b=2").mkdir()
    for name in ("lr=1e-4,b=2/mine.yaml", "seed=3", "seed=4.yaml"):
        Path(name).write_text("steps: 77\n")
        assert as_config([name, "seed=5"]).steps == 77
        assert main(["config", name, "seed=5"]) == 0
        assert "steps: 77" in capsys.readouterr().out
    assert as_config(["seed=6"]).seed == 6  # there is no such file
    with pytest.raises(UserError, match=r"lr=1e-4,b=2/none\.yaml"):
        as_config(["lr=1e-4,b=2/none.yaml"])


def test_a_leading_tilde_is_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text("run_dir: ~/a/b\nenv: {module: ~/mine.py}\n")
    paths = (str(tmp_path / "a/b"), str(tmp_path / "mine.py"))
    for loaded in (
        load(["~/mine.yaml"]),
        as_config(["~/mine.yaml"]),
        load([], ["run_dir=~/a/b", "env.module=~/mine.py"]),
        as_config({"run_dir": "~/a/b", "env": {"module": "~/mine.py"}}),
    ):
        assert (loaded.run_dir, loaded.env.module) == paths
    for text in ("a/~/b", "a~", "~nobody-of-this-name/x"):  # a shell leaves these as they are
        assert load([], [f"run_dir={text}"]).run_dir == text
    study = tmp_path / "study.yaml"
    study.write_text("tasks: [dummy:count]\nseeds: [1]\nfolder: ~/runs\n")
    assert jobs(read_study(study), study)[0].folder.parent == tmp_path / "runs"


# --- random texts ---------------------------------------------------------------------------

PIECES = (
    *("{", "}", "[", "]", ": ", ":", "- ", "&a ", "*a", "<<: ", "!!int ", "!!binary ", "!x ", "? "),
    *("\n", "\n  ", "---\n", "...\n", "#", "'", '"', "|\n", ">-\n", "%", "@", "`", "\t", "\\", ","),
    *("${seed}", "${", "}", "null", "~", "0x", "1e999", "-.inf", "9" * 40, "2001-01-01", "12:30"),
    *("\0", "\x85", "\ud800", "\ufeff", "é", "off", "true", "=", "seed: ", "env: ", "world.deter"),
)


def mutated(text: str, rng: random.Random) -> str:
    """A text with some pieces inserted, and some parts removed or repeated."""
    for _ in range(rng.randint(0, 3)):
        at, end = sorted(rng.randrange(len(text) + 1) for _ in range(2))
        end = min(end, at + 20)
        text = rng.choice(
            (
                text[:at] + rng.choice(PIECES) + text[at:],
                text[:at] + text[end:],
                text[:at] + text[at:end] * 3 + text[end:],
            )
        )
    return text


def test_random_texts_give_a_configuration_or_a_user_error(tmp_path: Path) -> None:
    rng = random.Random(0)
    path, accepted = tmp_path / "mine.yaml", 0
    fields = [key for key, _ in schema_fields()]
    saved = "".join(to_yaml(load([], ["device=cpu"])).splitlines(keepends=True)[:14])
    for _ in range(500):
        kind = rng.randrange(4)
        text = "".join(rng.choice(PIECES) for _ in range(rng.randint(1, 12)))
        if kind == 1:
            text = mutated("seed: 3\nenv: &e {repeat: 2}\nworld:\n  deter: 64\n", rng)
        elif kind == 2:
            text = mutated(saved, rng)
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
        try:
            if kind == 3:
                loaded = load([], [f"{rng.choice([*fields, *['run_dir'] * 99])}={text}"])
            else:
                loaded = rng.choice((lambda: load([path]), lambda: load_resolved(path)))()
        except UserError as error:
            assert "\n" not in str(error)
            continue
        accepted += 1
        assert isinstance(loaded, Config) and flatten(vars(loaded))
        path.write_text(to_yaml(loaded), encoding="utf-8")
        assert load_resolved(path) == loaded
    assert 50 < accepted < 450  # both outcomes were tried


def test_the_bounds_leave_room_for_a_full_configuration() -> None:
    text = to_yaml(load([], ["device=cpu"]))
    assert len(text) * 10 < yaml_text.MAX_BYTES
