from __future__ import annotations

import ast
import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import yaml

import latentplan
from latentplan.config import loading as config_module
from latentplan.config.loading import (
    flatten,
    load,
    load_resolved,
    preset_folder,
    task_preset,
    to_sealed_yaml,
    to_yaml,
)
from latentplan.config.renamed import RENAMED
from latentplan.config.schema import Config
from latentplan.config.tasks import DMC_TASKS
from latentplan.config.validation import check, schema_fields
from latentplan.runtime import device as runtime_device
from latentplan.types import UserError

CONFIGS = preset_folder()
STUDIES = CONFIGS / "study"  # files for latentplan.study, which are not settings of one run
FILES = sorted(
    path.relative_to(CONFIGS) for path in CONFIGS.rglob("*.yaml") if path.parent != STUDIES
)
NAMES = {
    kind: sorted(p.stem for p in (CONFIGS / kind).glob("*.yaml")) for kind in ("size", "ablation")
}
CPU = ["device=cpu"]
KINDS = {
    getattr(top.default_factory, "__name__", ""): top.name
    for top in fields(Config)
    if is_dataclass(top.default_factory)
}


@pytest.fixture
def presets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with minimal presets in place of the real one."""
    for kind in ("size", "task", "ablation"):
        (tmp_path / "configs" / kind).mkdir(parents=True)
    monkeypatch.setattr(config_module, "preset_folder", lambda: tmp_path / "configs")
    (tmp_path / "configs" / "default.yaml").write_text("size: cpu\n")
    (tmp_path / "configs" / "size" / "cpu.yaml").write_text("world: {deter: 8}\n")
    return tmp_path / "configs"


# --- presets --------------------------------------------------------------------------------


def test_there_are_presets() -> None:
    assert {"tiny", "cpu"} <= set(NAMES["size"])


@pytest.mark.parametrize("path", FILES, ids=str)
def test_every_preset_loads_and_takes_effect(path: Path) -> None:
    loaded = flatten(asdict(load([CONFIGS / path], CPU)))
    written = flatten(yaml.safe_load((CONFIGS / path).read_text()) or {})
    assert {key: loaded[key] for key in written if key != "size"} == {
        key: None if value is None else type(loaded[key])(value)
        for key, value in written.items()
        if key != "size"
    }


@pytest.mark.parametrize("size", NAMES["size"])
@pytest.mark.parametrize("ablation", ["none", *NAMES["ablation"]])
@pytest.mark.parametrize("task", ["cartpole_swingup", "gym:Pendulum-v1"])
def test_every_combination_of_presets_loads(size: str, ablation: str, task: str) -> None:
    overrides = [f"size={size}", f"ablation={ablation}", f"task={task}"]
    for obs in ("pixels", "state", "both"):
        loaded = load([], [*CPU, *overrides, f"obs={obs}"])
        assert (loaded.size, loaded.ablation, loaded.task, loaded.obs) == (
            size,
            ablation,
            task,
            obs,
        )


def test_every_task_preset_matches_a_task() -> None:
    names = {f"{domain}_{task}" for domain, tasks in DMC_TASKS.items() for task in tasks}
    for path in (CONFIGS / "task").glob("*.yaml"):
        if not path.stem.startswith("gym-"):
            assert any(f"{name}_".startswith(f"{path.stem}_") for name in names), path
        elif path.stem not in ("gym-ALE", "gym-MiniGrid"):  # known after an import of their module
            assert path.stem.removeprefix("gym-") in gymnasium.registry, path


@pytest.mark.parametrize(
    ("task", "preset"),
    [
        ("dmc:cartpole_swingup", "cartpole"),
        ("cartpole-swingup", "cartpole"),
        ("cartpole/balance", "cartpole"),
        (" Cartpole swingup", "cartpole"),
        ("dmc_cartpole_swingup", "cartpole"),
        ("cup_catch", "ball_in_cup"),
        ("dmc:ball_in_cup_catch", "ball_in_cup"),
        ("hopper_hop", None),
        ("gym:Pendulum-v1", None),
        ("gym:CartPole-v1", "gym-CartPole-v1"),
        ("gym:CartPole-v10", None),
        ("gym:ALE/Pong-v5", "gym-ALE"),
        ("gym:MiniGrid-DoorKey-5x5-v0", "gym-MiniGrid"),
        ("gym:MiniGridX-v0", None),
        ("dummy:pixels", None),
    ],
)
def test_every_spelling_of_a_task_gets_its_preset(task: str, preset: str | None) -> None:
    assert getattr(task_preset(task), "stem", None) == preset


def test_the_longest_matching_task_preset_is_used(presets: Path) -> None:
    for name in ("walker", "walker_run", "walk"):
        (presets / "task" / f"{name}.yaml").touch()
    stems = [
        getattr(task_preset(task), "stem", None)
        for task in ("walker_run", "walker_walk", "fish_swim")
    ]
    assert stems == ["walker_run", "walker", None]


@pytest.mark.parametrize("size", ["cpu", "tiny", "12m"])
def test_the_protocol_of_a_gymnasium_task_is_the_same_at_every_size(size: str) -> None:
    config = load([], [f"size={size}", "task=gym:Hopper-v5", "obs=state"])
    assert (config.env.repeat, config.behavior.discount) == (1, 0.99)
    assert config.behavior.gradient == "auto"  # from the observations
    assert load([], [f"size={size}", "task=gym:Hopper-v5", "env.repeat=3"]).env.repeat == 3


def test_later_sources_win(presets: Path, tmp_path: Path) -> None:
    def repeat(*items: str, files: tuple[Path, ...] = ()) -> int:
        return load(files, [*CPU, *items]).env.repeat

    def write(name: str, number: int) -> None:
        text = f"env: {{repeat: {number}}}\n"
        (presets / f"{name}.yaml").write_text(text + ("size: cpu\n" if name == "default" else ""))

    assert repeat("task=walker_walk") == Config().env.repeat
    for number, name in enumerate(["default", "task/walker", "size/cpu"], 3):
        write(name, number)
        assert repeat("task=walker_walk") == number
    write("ablation/some", 6)
    assert repeat("task=walker_walk") == 5  # the ablation is not chosen
    assert repeat("task=walker_walk", "ablation=some") == 6
    files = tmp_path / "one.yaml", tmp_path / "two.yaml"
    for number, file in enumerate(files, 7):
        file.write_text(f"env: {{repeat: {number}}}\nablation: some\n")
    assert repeat("task=walker_walk", files=files[:1]) == 7
    assert repeat("task=walker_walk", files=files) == 8
    assert repeat("env.repeat=9", files=files) == 9
    assert repeat("env.repeat=9", "env.repeat=10", files=files) == 10


def test_a_file_may_choose_the_presets(presets: Path, tmp_path: Path) -> None:
    (presets / "size" / "other.yaml").write_text("world: {deter: 96}\n")
    file = tmp_path / "mine.yaml"
    file.write_text("size: other\n")
    assert load([file], CPU).world.deter == 96
    assert load([file], [*CPU, "size=cpu"]).world.deter == 8


def test_the_default_size_follows_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for has_cuda in (True, False):
        monkeypatch.setattr(runtime_device, "has_cuda", lambda has_cuda=has_cuda: has_cuda)
        assert load([], ["device=cpu"]).size == "cpu"
        for device in ("auto", "cuda", "cuda:1"):
            assert load([], [f"device={device}"]).size == ("12m" if has_cuda else "cpu")


@pytest.mark.parametrize(
    ("content", "repeat", "deter"),
    [
        ("env.repeat: 3\nworld: {deter: 64}\n", 3, 64),
        ("env: {num_envs: 2}\nenv.repeat: 3\nworld.deter: 64\n", 3, 64),
        ("env.repeat: 4\nenv: {repeat: 3}\nworld.deter: 6.4e1\n", 3, 64),
        ("env.repeat: 3\nworld.hidden: 64\nworld.deter: ${world.hidden}\n", 3, 64),
    ],
)
def test_keys_of_a_file_may_be_dotted(
    tmp_path: Path, content: str, repeat: int, deter: int
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(content)
    loaded = load([file], CPU)
    assert (loaded.env.repeat, loaded.world.deter) == (repeat, deter)


# --- mistakes -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("wrold.deter=3", ["wrold.deter", "world.deter"]),
        ("horizon=3", ["horizon", "behavior.horizon", "plan.horizon"]),
        ("tsak=walker_walk", ["tsak", "'task'"]),
        ("task.name=3", ["task.name"]),
        ("world.deter=abc", ["world.deter", "abc", "integer"]),
        ("world.deter=1.5", ["world.deter", "1.5"]),
        ("world.deter=null", ["world.deter", "int"]),
        ("env.workers=perhaps", ["env.workers", "perhaps", "true or false"]),
        ("world=3", ["world", "section"]),
        ("world=[1]", ["world", "section"]),
        ("world.norm=batch", ["world.norm", "rms", "layer", "batch"]),
        ("obs=smell", ["obs", "pixels", "state", "both"]),
        ("size=nope", ["size", "nope", "cpu"]),
        ("ablation=nope", ["ablation", "nope"]),
        ("seed=${nope}", ["nope"]),
        ("world.deter=${world.norm}", ["world.deter"]),
        ("world.bins=[1", ["world.bins"]),
        ("seed", ["seed", "key=value"]),
        ("world.decode_fraction=1.5", ["world.decode_fraction", "at most 1", "1.5"]),
        ("behavior.std_min=3", ["behavior.std_min", "behavior.std_max"]),
        ("train.minutes=-1", ["train.minutes", "at least 0"]),
    ],
)
def test_a_wrong_override_gives_one_sentence_that_names_it(override: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load([], [*CPU, override])
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message and message.endswith((".", "?"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("world: {dter: 3}\n", ["world.dter", "world.deter", "mine.yaml"]),
        ("world.dter: 3\n", ["world.dter", "world.deter", "mine.yaml"]),
        ("world: 3\nworld.deter: 8\n", ["world", "section", "mine.yaml"]),
        ("world: {deter: many}\n", ["world.deter", "many"]),
        ("world: [1, 2]\n", ["world", "section", "mine.yaml"]),
        ("world: {deter: 3\n", ["mine.yaml", "YAML"]),
        ("- 1\n- 2\n", ["mine.yaml", "mapping"]),
        (None, ["mine.yaml", "No such file"]),
    ],
)
def test_a_wrong_file_gives_one_sentence_that_names_it(
    tmp_path: Path, content: str | None, words: list[str]
) -> None:
    file = tmp_path / "mine.yaml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError) as caught:
        load([file], CPU)
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


# --- the result -----------------------------------------------------------------------------


def test_the_result_is_frozen() -> None:
    loaded = load([], CPU)
    with pytest.raises(dataclasses.FrozenInstanceError):
        loaded.seed = 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        loaded.world.deter = 3
    assert isinstance(loaded, Config)


def test_values_have_the_types_of_the_schema() -> None:
    loaded = load([], [*CPU, "behavior.lam=1", "optim.world_lr=1e-3", "steps=1e3", "run_dir=123"])
    assert (loaded.behavior.lam, type(loaded.behavior.lam)) == (1.0, float)
    assert (loaded.optim.world_lr, loaded.steps, loaded.run_dir) == (1e-3, 1000, "123")


def test_a_run_folder_is_named_after_its_run() -> None:
    items = ["task=gym:Pendulum-v1", "obs=state", "seed=3"]
    assert load([], [*CPU, *items]).run_dir == "runs/gym-Pendulum-v1-state-cpu-s3"
    assert load([], [*CPU, *items, "run_dir=here/there"]).run_dir == "here/there"


def test_a_saved_configuration_is_read_back_unchanged(tmp_path: Path) -> None:
    overrides = ["task=walker_walk", "env.repeat=3", "world.deter=${world.hidden}", "seed=5"]
    loaded = load([], [*CPU, *overrides])
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(loaded))
    assert load_resolved(path) == loaded
    assert loaded.env.repeat == 3 and loaded.world.deter == loaded.world.hidden
    path.write_text(path.read_text().replace("seed: 5", "sede: 5"))
    with pytest.raises(UserError, match="sede"):
        load_resolved(path)


def test_bounds_allow_the_defaults_and_only_texts_have_choices() -> None:
    defaults = flatten(asdict(Config()))
    check({**defaults, "run_dir": "runs/any"})
    for key, field in schema_fields():
        bounds = field.metadata["bounds"]
        assert defaults[key] in bounds.choices if bounds.choices else True
        assert isinstance(defaults[key], str) or not bounds.choices


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("world.members=0", "world.members must be at least 1, not 0"),
        ("train.length=1", "train.length must be at least 2"),
        ("seed=18446744073709551616", "seed must be a finite number that fits into 64 bits, not"),
        ("train.ratio=0", "train.ratio must be more than 0"),
        ("world.bins=40", "world.bins must be odd"),
        ("world.blocks=3", "world.blocks must divide world.deter"),
        ("replay.capacity=10", r"replay.capacity must hold train.context \+ train.length rows"),
        ("eval.episodes=0", "eval.episodes must be at least 1"),
        ("world.anneal_updates=-5", "world.anneal_updates must be at least 0, not -5"),
        ("behavior.layers=-1", "behavior.layers must be at least 0"),
        ("env.timeout=-1.0", "env.timeout must be at least 0"),
        ("env.timeout=1e12", "env.timeout must be at most"),
        ("train.ratio=inf", "train.ratio must be a finite number"),
        ("train.minutes=nan", "train.minutes must be a finite number"),
        ("train.threads=99999999999999999999", "train.threads must be a finite number"),
    ],
)
def test_invalid_values_are_errors(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load([], [*CPU, override])


def test_an_ablation_may_build_on_another() -> None:
    shared, paper, no_penalty = (
        load([], [*CPU, f"ablation={name}"]) for name in ("mpdp_shared", "mpdp", "mpdp_no_penalty")
    )
    assert shared.mpdp.policies == "shared" and paper.mpdp.policies == "per_step"
    with_penalty = dataclasses.replace(no_penalty.mpdp, beta=paper.mpdp.beta)
    assert dataclasses.replace(paper, ablation="mpdp_no_penalty", run_dir=no_penalty.run_dir) == (
        dataclasses.replace(no_penalty, mpdp=with_penalty)
    )
    assert no_penalty.mpdp.beta == 0 < paper.mpdp.beta and no_penalty.behavior == shared.behavior


@pytest.mark.parametrize(
    ("one", "other"), [("pointmass_easy", "point-mass/easy"), ("swimmer6", "dmc:swimmer_swimmer6")]
)
def test_spellings_of_a_task_have_the_same_run_folder(one: str, other: str) -> None:
    assert load([], [*CPU, f"task={one}"]).run_dir == load([], [*CPU, f"task={other}"]).run_dir


def last_name(node: ast.AST | None) -> str:
    """The last part of a dotted name: ``plan`` for ``config.plan``."""
    return getattr(node, "attr", getattr(node, "id", ""))


def section(node: ast.AST, names: dict[str, str]) -> str:
    """The section that an expression refers to: ``config.plan``, or a variable in ``names``."""
    if isinstance(node, ast.Attribute) and last_name(node.value) == "config":
        return node.attr
    return names.get(last_name(node), "")


def section_variables(scope: ast.AST, known: dict[str, str]) -> dict[str, str]:
    """The variables of a function that refer to a section, by their annotation or assignment."""
    names = dict(known)
    for node in ast.walk(scope):
        if isinstance(node, ast.arg) and node.annotation is not None:
            names[node.arg] = KINDS.get(last_name(node.annotation), "")
        elif isinstance(node, ast.Assign):
            for target in node.targets:  # c = config.plan, or c, n = config.plan, 3
                pair = (getattr(x, "elts", [x]) for x in (target, node.value))
                names |= {last_name(a): section(b, names) for a, b in zip(*pair, strict=False)}
    return names


def reads(tree: ast.Module) -> Iterator[str]:
    """Every attribute that is read: ``section.key`` for sections, ``.key`` for other objects."""
    for scope in tree.body:
        known, parts = {"self": KINDS.get(getattr(scope, "name", ""), "")}, [scope]
        if isinstance(scope, ast.ClassDef):
            parts = scope.body
            for start in (x for x in parts if getattr(x, "name", "") == "__init__"):
                variables = section_variables(start, {})
                known |= {name: kind for name, kind in variables.items() if kind}
        for part in parts:
            names = section_variables(part, known)
            for node in ast.walk(part):
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                    yield f"{section(node.value, names)}.{node.attr}"


def test_every_field_is_read_somewhere() -> None:
    """Every key of the configuration has an effect."""
    files = Path(latentplan.__file__).parent.rglob("*.py")
    read = {key for path in files for key in reads(ast.parse(path.read_text()))}
    assert {key if "." in key else f".{key}" for key, _ in schema_fields()} - read == set()


def test_the_schema_explains_every_key() -> None:
    keys = dict(schema_fields())
    assert list(keys) == list(flatten(asdict(Config())))
    for key, field in keys.items():
        meaning = field.metadata["meaning"]
        assert meaning[0].isupper() or meaning.startswith("exact"), key
        assert meaning.endswith(".") and len(meaning.split()) >= 2, key


# --- names of earlier versions --------------------------------------------------------------


def test_a_file_of_an_earlier_version_is_read_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "old.yaml"
    file.write_text(
        "env: {count: 2}\nplan.imagine_share: 0.25\nworld.units: ${env.count}\ntrain.compile: full"
    )
    for _ in range(2):
        loaded = load([file], CPU)
    assert loaded.train.compile == "on"
    assert (loaded.env.num_envs, loaded.plan.imagine_fraction, loaded.world.units) == (2, 0.25, 2)
    (record,) = caplog.records
    assert "env.count is now env.num_envs" in record.getMessage()
    assert "plan.imagine_share is now plan.imagine_fraction" in record.getMessage()


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_an_earlier_name_on_the_command_line_is_an_error_that_gives_the_present_name(
    old: str, new: str
) -> None:
    assert new in dict(schema_fields()) and old not in dict(schema_fields())
    with pytest.raises(UserError, match=new.replace(".", r"\.")):
        load([], [*CPU, f"{old}=1"])


@pytest.mark.parametrize("text", ["1.10", "no", "off", "12:30:45", "0x10", "1e3", "a=b", "~x"])
def test_a_text_is_kept_as_it_is_written(tmp_path: Path, text: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"run_dir: {text}\n")
    assert load([file], CPU).run_dir == text
    assert load([], [*CPU, f"run_dir={text}"]).run_dir == text


def test_a_change_of_a_saved_configuration_is_never_silent(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One flipped bit gives an error, a warning or the same values."""
    config = load([], ["task=walker_walk", "seed=7"])
    content = to_sealed_yaml(config).encode()
    rng = np.random.default_rng(0)
    warned = 0
    for trial in range(300):
        damaged = bytearray(content)
        bit = int(rng.integers(8 * len(content)))
        damaged[bit // 8] ^= 1 << bit % 8
        path = tmp_path / f"{trial}.yaml"
        path.write_bytes(damaged)
        caplog.clear()
        with contextlib.suppress(UserError):
            read = load_resolved(path)
            assert caplog.messages or read == config, bit
            warned += bool(caplog.messages)
    assert warned > 10


def test_an_intact_or_earlier_configuration_gives_no_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = load([], ["seed=7"])
    for name, text in (("new", to_sealed_yaml(config)), ("earlier", to_yaml(config))):
        path = tmp_path / f"{name}.yaml"
        path.write_text(text)
        assert load_resolved(path) == config and not caplog.messages
    path = tmp_path / "new.yaml"
    path.write_text(path.read_text().replace("seed: 7", "seed: 8"))
    assert load_resolved(path).seed == load_resolved(path).seed == 8
    (message,) = caplog.messages
    assert "has been edited or damaged" in message
