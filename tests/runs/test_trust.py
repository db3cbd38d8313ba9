"""A run folder is data: the code that it names runs only if this user has trained with it."""

from __future__ import annotations

import importlib.util
import py_compile
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import latentplan
from latentplan.cli.main import main
from latentplan.config.loading import load_resolved, to_yaml
from latentplan.config.schema import Config, EnvConfig
from latentplan.envs.modules import import_module
from latentplan.runs import trust
from latentplan.types import UserError

ID = "Bad-v0"


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder, on the module path, and a state folder without records."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("LATENTPLAN_STATE", str(tmp_path / "state"))
    return folder


def config(task: str = "dummy:pixels", module: str = "") -> Config:
    return Config(task=task, env=EnvConfig(module=module))


def write(path: Path, text: str = "VALUE = 1\n") -> Path:
    """A Python file that leaves a trace when it is run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"open(r'{path}.ran', 'w').close()\n{text}")
    return path


def refused(named: Config, words: str, said: str = "") -> None:
    with pytest.raises(UserError, match="--trust") as caught:
        trust.check(named, Path("run"), said)
    assert words in str(caught.value)


def test_a_recorded_file_is_trusted_until_it_changes(places: Path) -> None:
    file = write(places / "mine.py")
    refused(config(module="mine.py"), str(file))
    trust.record(config(module=str(file)))
    trust.check(config(module="mine.py"), Path("run"))
    trust.check(config(module="../work/mine.py"), Path("run"))
    first = file.read_text()
    file.write_text(first + "# changed\n")
    refused(config(module="mine.py"), str(file))
    file.write_text(first)
    trust.check(config(module="mine.py"), Path("run"))
    shutil.copy(file, places / "copy.py")
    refused(config(module="copy.py"), "copy.py")
    assert not list(places.glob("*.ran"))


def test_a_link_is_judged_by_the_file_that_runs(places: Path, tmp_path: Path) -> None:
    mine, evil = write(places / "mine.py"), write(tmp_path / "other" / "evil.py")
    trust.record(config(module="mine.py"))
    (tmp_path / "other" / "link.py").symlink_to(mine)
    (tmp_path / "other" / "loop.py").symlink_to(tmp_path / "other" / "loop.py")
    trust.check(config(module=str(tmp_path / "other" / "link.py")), Path("run"))
    trust.check(config(module=str(tmp_path / "other" / "loop.py")), Path("run"))  # no file
    mine.unlink()
    mine.symlink_to(evil)
    refused(config(module="mine.py"), str(evil))
    (places / "pipe.py").mkdir()
    refused(config(module="pipe.py"), "pipe.py")


@pytest.mark.parametrize("place", ["module", "task"])
def test_every_file_of_a_chain_of_packages_counts(places: Path, place: str) -> None:
    def named() -> Config:
        name = "pack.inner.leaf"
        return config(module=name) if place == "module" else config(f"gym:{name}:{ID}")

    for name in ("__init__.py", "inner/__init__.py", "inner/leaf.py"):
        write(places / "pack" / name)
    refused(named(), "pack/__init__.py")
    trust.record(named())
    trust.check(named(), Path("run"))
    for name in ("pack/inner/leaf.py", "pack/inner/__init__.py", "pack/__init__.py"):
        changed = places / name
        changed.write_text(changed.read_text() + "# changed\n")
        refused(named(), name)
    assert not list(places.rglob("*.ran")) and "pack" not in sys.modules


def test_a_folder_without_init_is_a_package_too(places: Path) -> None:
    write(places / "stranger" / "deep" / "evil.py")
    refused(config(f"gym:stranger.deep.evil:{ID}"), "stranger/deep/evil.py")
    refused(config(f"gym:stranger.deep.evil.more:{ID}"), "stranger/deep/evil.py")
    refused(config(module="stranger.deep.evil"), "stranger/deep/evil.py")
    trust.check(config(module="stranger.deep"), Path("run"))  # it has no file that could run


def test_a_module_that_hides_another_one_is_found_where_python_finds_it(
    places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "library" / "tool.py")
    monkeypatch.syspath_prepend(str(tmp_path / "library"))
    trust.record(config(f"gym:tool:{ID}"))
    write(places / "tool.py")
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    refused(config(f"gym:tool:{ID}"), "work/tool.py")


def test_a_link_to_a_recorded_package_does_not_bring_a_strangers_neighbours(
    places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``from ..neighbour import x`` of a recorded file would run the file beside the link."""
    mine = tmp_path / "home"
    write(mine / "project" / "pack" / "leaf.py", "from ..neighbour import x\n")
    monkeypatch.syspath_prepend(str(mine))
    trust.record(config(f"gym:project.pack.leaf:{ID}"))
    (places / "stranger").mkdir()
    (places / "stranger" / "pack").symlink_to(mine / "project" / "pack")
    refused(config(f"gym:stranger.pack.leaf:{ID}"), "stranger/pack/leaf.py")


def test_a_task_finds_the_neighbours_of_the_module(places: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    write(home / "mine.py")
    trust.record(config(module=str(home / "mine.py")))
    write(home / "beside.py")
    refused(config(f"gym:beside:{ID}", str(home / "mine.py")), "beside.py")


def test_the_standard_library_is_no_exception() -> None:
    refused(config(f"gym:antigravity:{ID}"), "antigravity.py")
    trust.check(config(f"gym:sys:{ID}"), Path("run"))  # built in, and imported anyway


def test_odd_names_find_nothing_or_are_refused(places: Path) -> None:
    write(places / ".py")
    write(places / "evil.py")
    for name in ("", ".", "..", ".evil", "a..b", "no.such.module", "stranger/evil", " ", "a b"):
        trust.check(config(f"gym:{name}:{ID}"), Path("run"))
        trust.check(config(module=name), Path("run"))
    refused(config(f"gym:evil.py:{ID}"), "evil.py")  # imports evil before it fails
    refused(config(f"gym:evil.:{ID}"), "evil.py")
    refused(config(f"gym:evil:{ID}:more"), "evil.py")


def test_a_module_is_checked_for_every_task(places: Path) -> None:
    """``calibrate --unseen gym:ID`` would import the module of a run of another task."""
    write(places / "evil.py")
    refused(config("dummy:count", "evil.py"), "evil.py")


def test_what_the_person_names_is_trusted(places: Path) -> None:
    write(places / "mine.py")
    trust.check(config(module="mine.py"), Path("run"), "mine.py")
    trust.check(config(f"gym:mine:{ID}", "mine.py"), Path("run"), "mine.py")
    write(places / "evil.py")
    refused(config(f"gym:evil:{ID}", "mine.py"), "evil.py", "mine.py")


def test_a_module_in_an_archive(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(places / "content" / "zipped.py")
    archive = shutil.make_archive(str(places / "library"), "zip", places / "content")
    monkeypatch.syspath_prepend(archive)
    refused(config(f"gym:zipped:{ID}"), "library.zip/zipped.py")
    trust.record(config(f"gym:zipped:{ID}"))
    trust.check(config(f"gym:zipped:{ID}"), Path("run"))


def test_a_record_that_cannot_be_written_gives_a_warning(
    places: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write(places / "mine.py")
    (places / "file").write_text("")
    monkeypatch.setenv("LATENTPLAN_STATE", str(places / "file"))
    trust.record(config(module="mine.py"))
    assert "mine.py cannot be recorded" in caplog.text and "--trust" in caplog.text
    refused(config(module="mine.py"), "mine.py")


def test_the_state_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert trust.state_folder() == tmp_path / "state"
    monkeypatch.delenv("LATENTPLAN_STATE")
    monkeypatch.setenv("XDG_STATE_HOME", "/xdg")
    assert trust.state_folder() == Path("/xdg/latentplan")
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert trust.state_folder() == Path("/home/me/.local/state/latentplan")


# --- the commands ---------------------------------------------------------------------------


def stranger(run: Path, folder: Path, **named: str) -> Path:
    """A copy of a run whose configuration names code."""
    shutil.copytree(run, folder)
    saved = load_resolved(folder / "config.yaml")
    saved = replace(saved, task=named.get("task", f"gym:{ID}"))
    saved = replace(saved, env=replace(saved.env, module=named.get("module", "")))
    (folder / "config.yaml").write_text(to_yaml(saved))
    return folder


@pytest.mark.parametrize(
    "command", ["eval", "imagine", "calibrate", "diagnose", "report", "resume", "load"]
)
@pytest.mark.parametrize("named", [{"module": "stranger/evil.py"}, {"task": f"gym:evil:{ID}"}])
def test_no_command_runs_a_strangers_code(
    run: Path,
    places: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    named: dict[str, str],
) -> None:
    folder = stranger(run, places / "stranger", **named)
    write(folder / "evil.py")
    monkeypatch.syspath_prepend(str(folder))
    if command == "load":
        with pytest.raises(UserError, match=r"evil\.py.*trust=True"):
            latentplan.load(folder)
    else:
        assert main([command, str(folder)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("latentplan: ") and "evil.py" in error and error.count("\n") == 1
    assert not list(places.rglob("*.ran"))


def test_commands_that_build_no_environment_need_no_trust(run: Path, places: Path) -> None:
    folder = stranger(run, places / "stranger", module="stranger/evil.py")
    write(folder / "evil.py")
    assert main(["export", str(folder)]) == 0
    assert not list(places.rglob("*.ran"))


def test_trust_lets_the_code_run(
    run: Path, places: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = stranger(run, places / "stranger", module="stranger/evil.py")
    write(folder / "evil.py")
    for options in (["--trust"], ["--module", "stranger/evil.py"]):
        assert main(["eval", str(folder), *options, "--episodes", "1"]) == 2
        assert ID in capsys.readouterr().err  # it was imported, and registers nothing
    assert (folder / "evil.py.ran").exists()
    latentplan.load(folder, trust=True)


def test_compiled_code_beside_a_trusted_file_is_not_run(places: Path) -> None:
    file = places / "mine.py"
    file.write_text("VALUE = 1\n")
    trust.record(config(module=str(file)))
    source = write(places / "other.py")
    compiled = Path(importlib.util.cache_from_source(str(file)))
    compiled.parent.mkdir()
    # Python takes compiled code of this mode as it is, whatever the file says.
    mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
    py_compile.compile(str(source), str(compiled), invalidation_mode=mode)
    trust.check(config(module=str(file)), Path("run"))
    import_module(str(file))
    assert not list(places.rglob("*.ran"))
