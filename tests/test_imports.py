"""The direction of imports (docs/architecture.md), read from the source and seen in a process."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import latentplan

PACKAGE = Path(latentplan.__file__).parent
MODULES = {
    ".".join(("latentplan", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(
        ".__init__"
    ): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
# Each folder (or module of the package itself), and what it may import besides itself.
ALLOWED = {
    "types": "",
    "runtime": "types",
    "config": "types runtime",
    "nn": "",
    "envs": "types runtime config",
    "data": "types runtime",
    "datasets": "types envs data",
    "world": "types config nn",
    "behavior": "types config nn",
    "agent": "types config nn world behavior",
    "runs": "types runtime config envs data agent",
    "deploy": "types runtime config envs agent runs",
    "evaluation": "types runtime config envs agent runs",
    "inspection": "types runtime config nn envs behavior agent runs evaluation",
    "training": "types runtime config envs data agent runs evaluation inspection",
    "study": "types runtime config runs inspection",
    "bench": "types runtime config envs data behavior agent runs training",
    "cli": "types runtime config envs datasets runs deploy evaluation inspection training study "
    "bench",
    "__main__": "cli",
}


def folder(module: str) -> str:
    """The folder of a module of the package, or its own name where it lies in none."""
    return module.split(".")[1]


def imports(source: str, module: str, known: set[str]) -> Iterator[str]:
    """Every module that ``source`` imports, anywhere in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: relative imports hide what is imported"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in known else node.module


def wrong_imports(module: str, source: str) -> list[str]:
    """The imports of ``source`` that its folder is not allowed."""
    own = folder(module)
    return [
        f"{module} imports {target}"
        for target in imports(source, module, set(MODULES))
        if target.startswith("latentplan.") and folder(target) not in (own, *ALLOWED[own].split())
    ]


def test_every_folder_is_listed_and_imports_only_from_those_above_it() -> None:
    assert {folder(module) for module in MODULES if module != "latentplan"} == set(ALLOWED)
    listed: set[str] = set()
    for name, allowed in ALLOWED.items():
        assert set(allowed.split()) <= listed, name
        listed.add(name)


@pytest.mark.parametrize("module", [name for name in MODULES if name != "latentplan"])
def test_imports_go_one_way(module: str) -> None:
    assert wrong_imports(module, MODULES[module].read_text()) == []


def test_every_allowed_import_exists() -> None:
    used: dict[str, set[str]] = {name: set() for name in ALLOWED}
    for module, path in MODULES.items():
        if module != "latentplan":
            targets = imports(path.read_text(), module, set(MODULES))
            used[folder(module)] |= {
                folder(target) for target in targets if target.startswith("latentplan.")
            }
    for name, allowed in ALLOWED.items():
        assert set(allowed.split()) == used[name] - {name}, name


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("latentplan.world.rssm", "from latentplan.behavior.networks import Actor"),
        ("latentplan.behavior.losses", "def f():\n    import latentplan.world.model"),
        ("latentplan.data.replay", "from latentplan.runs import checkpoint"),
        ("latentplan.envs.dmc", "from latentplan.data.replay import Replay"),
        ("latentplan.nn.distributions", "from latentplan.world import rssm"),
        ("latentplan.agent", "from latentplan.inspection.film import film"),
        ("latentplan.training.loop", "from latentplan.cli import main"),
    ],
)
def test_a_wrong_import_is_noticed(module: str, source: str) -> None:
    assert len(wrong_imports(module, source)) == 1


def test_the_package_itself_imports_nothing_at_once() -> None:
    tree = ast.parse(MODULES["latentplan"].read_text())
    at_once = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [node.module for node in at_once if isinstance(node, ast.ImportFrom)]
    assert len(names) == len(at_once) and set(names) <= {"__future__", "typing"}


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith("latentplan.envs")])
def test_environments_never_name_torch(module: str) -> None:
    named = set(imports(MODULES[module].read_text(), module, set(MODULES)))
    assert not {name for name in named if name.split(".")[0] in ("torch", "torchvision")}


LIGHT = ["envs", "types", "config.loading", "cli.main", "data.replay", "runtime.clock"]


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_load_nothing_heavy(module: str) -> None:
    code = (
        f"import sys, latentplan.{module}\n"
        "print([m for m in ('torch', 'torchvision', 'dm_control', 'mujoco') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
