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
    if "configs" not in path.parts
}
# A module may import from lower layers and from its own group, never from another of its layer.
LAYERS = [
    {
        "types": "types",
        "schema": "schema",
        "limits": "limits",
        "config": "config",
        "task_names": "task_names",
        "torchvision_compat": "tv",
        **{name: name for name in ("allocator", "cores", "disk", "hardware")},
    },
    {name: name for name in ("envs", "replay", "logger", "checkpoint", "clock")},
    {"nn": "nn"},
    {"world": "world", "behavior": "behavior"},
    {"agent": "agent", "inspection": "inspection"},
    {
        name: "run"
        for name in (
            "run_folder",
            "evaluate",
            "batches",
            "calibrate",
            "compiling",
            "imagine",
            "board",
            "monitor",
            "provenance",
            "train",
            "bench",
            "deploy",
            "doctor",
            "export",
        )
    },
    {"study": "study"},
    {"commands": "commands"},
    {"cli": "cli"},
]
# Between modules of one layer: schemas may use the shared nouns, and looking sees the agent.
SIDEWAYS = {
    *((name, "types") for name in ("config", "limits", "task_names", "disk")),
    *((name, "schema") for name in ("config", "limits")),
    *(("config", name) for name in ("limits", "task_names", "hardware")),
    ("inspection", "agent"),
}


def place(module: str) -> tuple[int, str]:
    """The layer and group of a module of the package."""
    top = module.split(".")[1]
    for layer, groups in enumerate(LAYERS):
        if top in groups:
            return layer, groups[top]
    raise LookupError(f"{module} has no layer: give it one here and in docs/architecture.md")


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
    layer, group = place(module)
    wrong = []
    for target in imports(source, module, set(MODULES)):
        if not target.startswith("latentplan."):
            continue
        below, other = place(target)
        sideways = below == layer and other != group and (group, other) not in SIDEWAYS
        if below > layer or sideways:
            wrong.append(f"{module} imports {target}")
    return wrong


@pytest.mark.parametrize("module", [name for name in MODULES if name != "latentplan"])
def test_imports_go_one_way(module: str) -> None:
    assert wrong_imports(module, MODULES[module].read_text()) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("latentplan.world.rssm", "from latentplan.behavior.nets import Actor"),
        ("latentplan.behavior.losses", "def f():\n    import latentplan.world.model"),
        ("latentplan.replay", "from latentplan import checkpoint"),
        ("latentplan.envs.dmc", "from latentplan.clock import Every"),
        ("latentplan.nn.dists", "from latentplan.world import rssm"),
        ("latentplan.agent", "from latentplan.inspection.film import film"),
        ("latentplan.train", "from latentplan import cli"),
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


LIGHT = ["envs", "types", "config", "cli", "commands", "replay", "clock"]


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_load_nothing_heavy(module: str) -> None:
    code = (
        f"import sys, latentplan.{module}\n"
        "print([m for m in ('torch', 'torchvision', 'dm_control', 'mujoco') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
