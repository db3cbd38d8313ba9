"""Metadata, pinned versions and set-up scripts must agree with each other and with the tree."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import latentplan
from latentplan.config.renamed import RENAMED

ROOT = Path(__file__).parent.parent
SCRIPTS = [
    "tools/install-system",
    "tools/install-python",
    "tools/quickstart",
    "tools/test",
    ".ci/run",
]
SHELL = [*SCRIPTS, "tools/common.sh"]


@pytest.fixture(scope="module")
def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


@pytest.fixture(scope="module")
def requirements(setup_cfg: configparser.ConfigParser) -> dict[str, Requirement]:
    lines = setup_cfg["options"]["install_requires"].splitlines()
    for extra in setup_cfg["options.extras_require"].values():
        lines += extra.splitlines()
    parsed = [Requirement(line) for line in lines if line.strip()]
    return {canonicalize_name(requirement.name): requirement for requirement in parsed}


@pytest.fixture(scope="module")
def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    assert all(len(pair) == 2 for pair in pairs), "constraints.txt holds exact versions only"
    names = [canonicalize_name(name) for name, _ in pairs]
    assert len(set(names)) == len(names)
    return dict(zip(names, (version for _, version in pairs), strict=True))


def test_every_requirement_is_pinned_within_its_bounds(
    requirements: dict[str, Requirement], pins: dict[str, str]
) -> None:
    for name, requirement in requirements.items():
        assert name in pins, f"{name} is missing in constraints.txt"
        assert requirement.specifier.contains(pins[name]), f"{requirement} excludes {pins[name]}"


def test_the_pair_known_to_break_is_bounded_on_both_sides(
    requirements: dict[str, Requirement],
) -> None:
    for name in ("mujoco", "dm-control"):
        operators = {bound.operator for bound in requirements[name].specifier}
        assert operators == {">=", "<"}, name
    assert not requirements["mujoco"].specifier.contains("4.0.0")


def test_pins_fit_a_cpu_build(pins: dict[str, str]) -> None:
    assert Requirement(f"torch=={pins['torch']}").specifier.contains(f"{pins['torch']}+cpu")
    assert not any(Version(version).local for version in pins.values())
    assert not any(name.startswith("nvidia") or name == "triton" for name in pins)


def test_pyproject_holds_the_build_system_only() -> None:
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    assert len(lines) == 3
    assert lines[0] == "[build-system]"


def test_every_folder_of_code_is_a_package() -> None:
    folders = {path.parent for path in (ROOT / "latentplan").rglob("*.py")}
    assert all((folder / "__init__.py").exists() for folder in folders)


def build(source: Path, what: str, out: Path) -> Path:
    """Build the ``sdist`` or the ``wheel`` of a source tree, as pip does."""
    program = (
        "import sys; from setuptools import build_meta;"
        "print(getattr(build_meta, 'build_' + sys.argv[1])(sys.argv[2]))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, what, str(out)],
        cwd=source,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    return out / run.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    """The paths of all files that belong to the project, or will when they are committed."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if run.returncode != 0:
        pytest.skip("git does not know the files of the project here")
    return [name for name in run.stdout.splitlines() if (ROOT / name).exists()]


@pytest.fixture(scope="module")
def unpacked(tracked: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The content of a source distribution."""
    folder = tmp_path_factory.mktemp("sdist")
    source = folder / "source"
    for name in tracked:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name, follow_symlinks=False)
    with tarfile.open(build(source, "sdist", folder)) as archive:
        archive.extractall(folder, filter="data")
    return folder / f"latentplan-{latentplan.__version__}"


def test_a_source_distribution_holds_every_file(unpacked: Path, tracked: list[str]) -> None:
    missing = [name for name in tracked if not (unpacked / name).exists()]
    assert "tests/test_packaging.py" in tracked and missing == []


def test_a_wheel_carries_the_code_and_the_configs(unpacked: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(build(unpacked, "wheel", tmp_path)) as archive:
        held = set(archive.namelist())
        (entry_points,) = [name for name in held if name.endswith("entry_points.txt")]
        assert "latentplan = latentplan.cli.main:main" in archive.read(entry_points).decode()
    code = {str(path.relative_to(ROOT)) for path in (ROOT / "latentplan").rglob("*.py")}
    configs = {
        f"latentplan/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*.yaml")
    }
    assert configs
    data = {"latentplan/study/visual_dmc_scores.csv", "latentplan/study/page.html"}
    assert code | configs | data <= held
    assert not any(name.startswith(("tests/", "tools/", "configs/")) for name in held)


@pytest.mark.parametrize("script", SHELL)
def test_scripts_parse(script: str) -> None:
    subprocess.run(["bash", "-n", ROOT / script], check=True)


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_strict_and_executable(script: str) -> None:
    path = ROOT / script
    assert os.access(path, os.X_OK)
    text = path.read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in text


@pytest.mark.parametrize("script", SCRIPTS[:-1])
def test_scripts_print_help_from_any_folder(script: str, tmp_path: Path) -> None:
    run = subprocess.run([ROOT / script, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(f"usage: {script}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [["--minutes", "soon"], ["--minutes"], ["--fast"], ["task"]])
def test_quickstart_refuses_unknown_arguments(arguments: list[str]) -> None:
    run = subprocess.run([ROOT / "tools/quickstart", *arguments], capture_output=True, text=True)
    assert run.returncode == 2
    assert "--minutes" in run.stderr


def test_an_unfit_python_is_named(tmp_path: Path) -> None:
    environment = os.environ | {
        "LATENTPLAN_PYTHON": "/bin/false",
        "LATENTPLAN_VENV": str(tmp_path / "venv"),
    }
    run = subprocess.run(
        [ROOT / "tools/install-python"], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 1
    assert "Python 3.11 or 3.12" in run.stderr
    assert not (tmp_path / "venv").exists()


def test_missing_libraries_are_named_where_apt_is_out_of_reach(tmp_path: Path) -> None:
    fakes = {"ldconfig": "exit 0", "id": "echo 1000", "sudo": "exit 1", "uname": "echo Linux"}
    for name, body in fakes.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    environment.pop("LATENTPLAN_SKIP_SYSTEM", None)
    run = subprocess.run(
        [ROOT / "tools/install-system"], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 1
    for package in ("libegl1", "libgl1", "libglvnd0", "libosmesa6"):
        assert re.search(rf"\b{package}\b", run.stderr), run.stderr


def test_docker_runs_the_same_scripts() -> None:
    text = (ROOT / "Dockerfile").read_text()
    steps = text.replace("\\\n", " ").splitlines()
    runs = [step for step in steps if step.startswith("RUN ")]
    assert any("tools/install-system" in step for step in runs)
    assert any("tools/install-python" in step for step in runs)
    assert not any(re.search(r"\bpip install\b|\bapt(-get)? install\b", step) for step in runs)
    for line in (
        'ENTRYPOINT ["latentplan"]',
        'CMD ["--help"]',
        "USER latentplan",
        "FROM ${BASE}",
    ):
        assert line in steps
    # The tag names one release, so that a later build has the same Python.
    assert re.search(r"^ARG BASE=python:3\.11\.\d+-slim-bookworm$", text, re.MULTILINE)
    assert "NVIDIA_DRIVER_CAPABILITIES=compute,utility,graphics" in text
    assert "/usr/share/glvnd/egl_vendor.d/10_nvidia.json" in text


def test_docker_copies_what_exists() -> None:
    text = (ROOT / "Dockerfile").read_text()
    for line in re.findall(r"^COPY (.+)$", text, flags=re.MULTILINE):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists(), source


def test_the_changelog_names_every_renamed_key() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    for old, new in RENAMED.items():
        assert f"| `{old}` | `{new}` |" in text


def test_the_workflow_runs_the_test_script() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())
    (job,) = workflow["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == ["tools/test"]
    used = {step["uses"].split("@")[0] for step in job["steps"] if "uses" in step}
    assert used == {"actions/checkout", "actions/setup-python"}


def test_pre_commit_hooks_are_local() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert [repository["repo"] for repository in config["repos"]] == ["local"]
    assert all(hook["language"] == "system" for hook in config["repos"][0]["hooks"])


def test_the_citation_file_has_the_version_of_the_package() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == latentplan.__version__
    for work in (citation, *citation["references"]):
        assert work["title"] and work["authors"] and work["type"]
    assert len(citation["references"]) == 3


def test_result_files_contain_no_path_of_a_machine() -> None:
    files = [path for path in (ROOT / "docs/results").iterdir() if path.suffix in (".json", ".csv")]
    assert files
    for path in files:
        # A path that begins at the root follows a quotation mark, an equals sign, or a comma.
        result = re.findall(
            r"""(?:^|["'=:,\s])(/[\w.]+/[^"',\s]*)""", path.read_text(), re.MULTILINE
        )
        assert result == [], path.name
