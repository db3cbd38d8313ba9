"""The documents agree with the program: commands, links, names of functions and keys."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from latentplan.cli.arguments import load
from latentplan.cli.main import _parse
from latentplan.config.validation import schema_fields

ROOT = Path(__file__).resolve().parent.parent
# Results and measurements give the commands of the commits that made them.
OF_OTHER_COMMITS = {"results.md", "performance.md"}
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *(path for path in sorted((ROOT / "docs").glob("*.md")) if path.name not in OF_OTHER_COMMITS),
]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    """The arguments of every ``latentplan`` command in the shell blocks of a page."""
    result = []
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["latentplan"]:
                result.append(words[1:])
    return result


def test_there_are_commands_to_check() -> None:
    assert len(commands(ROOT / "README.md")) >= 8
    assert sum(len(commands(page)) for page in PAGES) > 30


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_is_understood(page: Path) -> None:
    for words in commands(page):
        args = _parse(words)
        if words[0] in ("train", "config"):
            # A file of the reader's own does not exist here.
            args.items = [item for item in args.items if "=" in item or (ROOT / item).is_file()]
            load(args)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_python_example_is_valid_syntax(page: Path) -> None:
    for block in blocks(page, "python"):
        compile(block, page.name, "exec")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if not target.startswith(("http://", "https://", "#")):
            assert (page.parent / target.split("#")[0]).exists(), target


def test_the_methods_name_functions_and_keys_that_exist() -> None:
    text = (ROOT / "docs/methods.md").read_text()
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    sources = "\n".join(path.read_text() for path in (ROOT / "latentplan").rglob("*.py"))
    defined = set(re.findall(r"(?:def|class) (\w+)", sources))
    keys = {key for key, _ in schema_fields()}
    sections = {key.split(".")[0] for key in keys if "." in key}
    ablations = {path.stem for path in (ROOT / "configs/ablation").iterdir()}
    named = re.findall(r"`([A-Za-z_]+(?:\.[A-Za-z_]+)?)(?:\([^)`]*\))?`", prose)
    assert len(named) > 40
    for name in named:
        section, dot, _ = name.partition(".")
        if dot and section in sections:
            assert name in keys, name
        elif re.search("[._A-Z]", name) and not name.endswith(".py"):
            assert name in ablations or set(name.split(".")) <= defined, name
    paths = re.findall(r"`([a-z_/]+\.py)`", prose)
    assert paths and all((ROOT / "latentplan" / path).is_file() for path in paths)
