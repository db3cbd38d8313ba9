from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from environments import ROOT, run_python
from tensorboard.compat.tensorflow_stub.io import gfile

from latentplan import __version__
from latentplan.cli import machine_commands as machine
from latentplan.cli import main as cli
from latentplan.cli import run_commands as runs
from latentplan.cli.main import main
from latentplan.config.loading import load, load_resolved
from latentplan.types import UserError

COMMANDS = (
    *("train", "resume", "config", "eval", "imagine", "calibrate", "diagnose", "report"),
    *("export", "study", "plot", "scores", "tensorboard", "list", "doctor", "bench"),
)


def wrapped(error: Exception, outer: Exception) -> Exception:
    outer.__cause__ = error
    return outer


def test_help_names_every_command_without_importing_torch() -> None:
    code = (
        "import sys\n"
        "from latentplan.cli.main import main\n"
        "try:\n    main(['--help'])\n"
        "except SystemExit as end:\n    assert end.code == 0\n"
        "assert 'torch' not in sys.modules and 'dm_control' not in sys.modules\n"
    )
    text = run_python("-c", code)
    assert all(command in text for command in COMMANDS) and "examples:" in text


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0 and f"latentplan {command}" in capsys.readouterr().out


def test_a_closed_pipe_ends_the_command_quietly() -> None:
    """`latentplan config | head -1` prints no traceback."""
    command = [sys.executable, "-m", "latentplan", "config"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait(60) == 141


def test_waiting_threads_spin_for_a_short_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    assert main(["config"]) == 0 and os.environ["GOMP_SPINCOUNT"] == cli.SPINS
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    assert main(["config"]) == 0 and os.environ["GOMP_SPINCOUNT"] == "7", (
        "the value of the user is kept"
    )


def test_overrides_may_occur_anywhere(capsys: pytest.CaptureFixture[str]) -> None:
    args = cli._parse(["bench", "--size", "cpu", "obs=state", "--repeats", "3", "seed=4"])
    assert args.items == ["obs=state", "seed=4"] and args.repeats == 3
    for wrong in (["bench", "--repeat", "--unknown=3"], ["eval", "run", "seed=4"], ["doctor", "x"]):
        with pytest.raises(SystemExit) as end:
            cli._parse(wrong)
        assert end.value.code == 2 and capsys.readouterr().err


def test_the_package_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "latentplan"]
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=60)
    assert version.returncode == 0 and version.stdout.strip() == __version__
    wrong = subprocess.run(
        [*command, "list", "nothing"], capture_output=True, text=True, timeout=60
    )
    assert wrong.returncode == 2 and wrong.stderr.startswith("latentplan: ")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.strip() == __version__


@pytest.mark.parametrize(
    "arguments", [[], ["trian"], ["eval"], ["eval", "x", "--episodes", "many"]]
)
def test_a_wrong_command_line_is_exit_code_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2 and "usage:" in capsys.readouterr().err


def test_config_prints_the_configuration_of_train(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("world: {members: 7}\nseed: 3\n")
    overrides = ["device=cpu", "task=walker_walk", "seed=4"]
    assert main(["config", str(mine), *overrides]) == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    printed = load_resolved(tmp_path / "printed.yaml")
    assert printed == load([mine], overrides)
    assert (printed.world.members, printed.seed, printed.task) == (7, 4, "walker_walk")


def test_tensorboard_needs_existing_folders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tensorboard", str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a"], ["--logdir", "{0}"]),
        (["a", "b"], ["--logdir_spec", "a:{0},b:{1}"]),
        (["a/run", "b/run"], ["--logdir_spec", "a/run:{0},b/run:{1}"]),
    ],
)
def test_tensorboard_is_reachable_only_from_this_machine_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: list[str], expected: list[str]
) -> None:
    called = []
    monkeypatch.setattr(machine.os, "execv", lambda program, command: called.append(command))
    folders = [tmp_path / name for name in names]
    for folder in folders:
        folder.mkdir(parents=True)
    main(["tensorboard", *map(str, folders)])
    main(["tensorboard", *map(str, folders), "--host", "0.0.0.0", "--port", "7"])
    first, second = (command[3:] for command in called)
    assert first[:2] == [text.format(*folders) for text in expected]
    assert first[2:] == ["--host", "localhost", "--port", "6006"]
    assert second[2:] == ["--host", "0.0.0.0", "--port", "7"]


def test_tensorboard_shows_runs_with_commas_and_colons_in_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorBoard's list of folders has no quotes, so it gets a folder of links."""
    called = []
    monkeypatch.setattr(machine.os, "execv", lambda program, command: called.append(command))
    monkeypatch.setattr(machine.tempfile, "tempdir", str(tmp_path))
    names = ["lr=1,b=2/run", "12:30/run", "plain/run"]
    for name in names:
        (tmp_path / name).mkdir(parents=True)
    main(["tensorboard", *(str(tmp_path / name) for name in names)])
    option, links = called[0][3:5]
    assert option == "--logdir"
    for name in names:
        assert (Path(links) / name).resolve() == tmp_path / name
    # TensorBoard walks through links.
    (tmp_path / names[1] / "events.out.tfevents.1").touch()
    found = [folder for folder, _, files in gfile.walk(links) if files]
    assert found == [str(Path(links) / names[1])]


def test_tensorboard_takes_the_place_of_this_process(tmp_path: Path) -> None:
    """A signal to the command reaches the server, so that none is left when the command ends."""
    command = [sys.executable, "-m", "latentplan", "tensorboard", str(tmp_path), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert any("http://" in line for line in process.stderr)
        assert "tensorboard.main" in psutil.Process(process.pid).cmdline()
        children = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        process.wait(60)
    assert psutil.wait_procs(children, timeout=10)[1] == []


@pytest.mark.parametrize("option", ["--out", "--video", "--module", "--json", "--against"])
def test_a_leading_tilde_of_a_path_is_the_home_folder(
    monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    command = {"--out": "imagine", "--json": "bench", "--against": "bench"}.get(option, "eval")
    folder = ["~/run"] if command != "bench" else []
    args = cli._parse([command, *folder, f"{option}=~/x"])
    assert str(vars(args)[option.removeprefix("--")]) == "/home/someone/x"
    assert not folder or args.run_folder == Path("/home/someone/run")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "x.bin"),
            2,
            "x.bin: No space left on device.",
        ),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "a/b"), 2, "a/b: Not a directory."),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 2, "Disk quota exceeded"),
        (
            wrapped(OSError(errno.ENOSPC, "No space left on device", "x"), RuntimeError("torch")),
            2,
            "x: No space left on device.",
        ),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_an_interrupted_command_prints_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    message: str,
) -> None:
    def fail(args: object) -> int:
        raise error

    monkeypatch.setattr(runs, "_config", fail)
    assert main(["config"]) == code
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EMFILE, "Too many open files", "x.bin"),
        OSError(errno.EMFILE, "Too many open files"),
        OSError(errno.ENFILE, "Too many open files in system"),
        ImportError("libtorch.so: cannot open shared object file: Too many open files"),
        UserError("The configuration x.yaml cannot be read: Too many open files."),
        wrapped(OSError(errno.EMFILE, "Too many open files"), UserError("x cannot be built.")),
        wrapped(OSError(errno.EMFILE, "Too many open files"), RuntimeError("no worker")),
    ],
    ids=repr,
)
def test_too_few_file_handles_are_named_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    def fail(args: object) -> int:
        raise error

    monkeypatch.setattr(runs, "_config", fail)
    assert main(["config"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("latentplan: Too many files are open") and "ulimit -n" in line


@pytest.mark.parametrize("handles", [8, 14])
def test_a_command_with_a_low_limit_of_file_handles_ends_with_one_sentence(
    tmp_path: Path, handles: int
) -> None:
    program = (
        "import resource, sys, os; from latentplan.cli.main import main;"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, ({handles}, {handles}));"
        f"kept = [os.open(os.devnull, 0) for _ in range({handles - 5})];"
        "sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", program, "train", "task=dummy:count", "size=tiny", "obs=state"]
    done = subprocess.run(
        [*command, "device=cpu", f"run_dir={tmp_path / 'run'}"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "ulimit -n" in done.stderr.splitlines()[-1]


def test_a_program_error_is_not_reported_as_a_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (OSError(errno.EBADF, "Bad file descriptor"), ValueError("a bug")):

        def fail(args: object, error: Exception = error) -> int:
            raise error

        monkeypatch.setattr(runs, "_config", fail)
        with pytest.raises(type(error)):
            main(["config"])
