"""Whether the Python files that a saved configuration names may be imported.

``env.module`` and a task ``gym:module:Id`` name Python files, and building the environment runs
them. A run folder may come from a stranger, so that a saved configuration alone must not run code.
A file is imported if a training run of this user has recorded it, with the same path and content,
or if the person names it now.

The record is a folder with one small file per recorded file: ``trusted`` in the user's state folder
(:func:`state_folder`). The name of a record is a hash of path and content, so that two sessions
never change the same record, and an interrupted write spoils no other record.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from importlib.machinery import BuiltinImporter, FrozenImporter, ModuleSpec, PathFinder
from pathlib import Path

from latentplan.config.schema import Config
from latentplan.envs import parse_task
from latentplan.runtime import disk
from latentplan.types import UserError, shown

log = logging.getLogger("latentplan")
STANDARD_FINDERS = (BuiltinImporter, FrozenImporter, PathFinder)


def state_folder() -> Path:
    """The folder of the record: ``$LATENTPLAN_STATE``, or ``latentplan`` in the XDG state folder.

    Raises:
        RuntimeError: no variable is set, and this user has no home folder.
    """
    if chosen := os.environ.get("LATENTPLAN_STATE"):
        return Path(chosen).expanduser().absolute()
    chosen = os.environ.get("XDG_STATE_HOME", "")
    if os.path.isabs(chosen):  # the XDG specification says to ignore other paths
        return Path(chosen) / "latentplan"
    return Path.home() / ".local" / "state" / "latentplan"


def record(config: Config) -> None:
    """Record the Python files of a training run's environment, so that they may be imported later.

    A warning says when a record cannot be written. The run goes on.

    Args:
        config: a configuration that the person gave, or that :func:`check` has accepted.
    """
    for path in environment_files(config):
        try:
            content = _hash(path)
            entry = _entry(path, content)
            if not entry.exists():
                text = json.dumps({"path": str(path), "sha256": content}) + "\n"
                with disk.replacing(entry) as file:
                    file.write(text.encode())
        except (OSError, RuntimeError) as error:
            log.warning(
                "%s cannot be recorded as code that you have run (%s): commands that read this run "
                "need --trust.",
                *(path, error),
            )


def check(config: Config, folder: Path, named: str = "") -> None:
    """Check that the files that a saved configuration names may be imported. Imports nothing.

    Args:
        config: the configuration, with ``named`` in the place of its ``env.module`` if it is given.
        folder: the run folder, for the message.
        named: a file or module that the person names.

    Raises:
        UserError: a file was not recorded by a training run of this user, or has changed since.
    """
    allowed = set(_files_of(named, sys.path)) if named else set()
    for path in environment_files(config):
        if path in allowed:
            continue
        try:
            recorded = _entry(path, _hash(path)).exists()
        except (OSError, RuntimeError):
            recorded = False
        if not recorded:
            raise UserError(
                f"{folder} would run the code in {shown(str(path), quoted=False)}, which no "
                "training run of yours has recorded in its present form: read that file, and then "
                "repeat the command with --trust (in Python: trust=True), or name your own file "
                "with --module FILE."
            )


def environment_files(config: Config) -> list[Path]:
    """The Python files that are executed when the environment is imported.

    These are the file or module of ``env.module`` and the module of a task ``gym:module:Id``, with
    the packages that contain them. A module that does not exist is left out. What those files
    import in turn is not listed: it is their own choice.
    """
    module = config.env.module
    files = _files_of(module, sys.path) if module else []
    suite, name = parse_task(config.task)
    if suite == "gym" and ":" in name:
        task_module = name.split(":")[0]
        files += _files_of(task_module, sys.path)
        if module.endswith(".py"):  # the file's neighbours can be imported by their names
            files += _files_of(task_module, [os.path.dirname(os.path.realpath(module)), *sys.path])
    return list(dict.fromkeys(files))


def _files_of(module: str, path: Sequence[str]) -> list[Path]:
    """The files that importing a .py file or a module name executes.

    A .py file is known by its path without symbolic links, because it is imported by that path. A
    module is known by the path at which it was found: it finds its neighbours beside the link.
    """
    if module.endswith(".py"):
        file = os.path.realpath(module)  # a loop of links is no error
        return [Path(file)] if os.path.exists(file) else []
    return [Path(os.path.abspath(origin)) for origin in _origins(module, path)]


def _origins(module: str, path: Sequence[str]) -> Iterator[str]:
    """The files of a module and of the packages around it. Imports none of them.

    Python's own search for ``a.b`` imports ``a``, so each part is searched for by itself.
    """
    locations: Sequence[str] | None = None
    parts = module.split(".")
    for count, part in enumerate(parts, 1):
        spec = _find(".".join(parts[:count]), part, path, locations)
        if spec is None:
            return
        if spec.has_location and spec.origin:
            yield spec.origin
        if spec.submodule_search_locations is None:
            return
        locations = list(spec.submodule_search_locations)


def _find(
    name: str, part: str, path: Sequence[str], locations: Sequence[str] | None
) -> ModuleSpec | None:
    """What the import system would find for the module ``name``, whose last part is ``part``."""
    importlib.invalidate_caches()
    for finder in sys.meta_path:
        if finder is PathFinder:
            # A name without dots, because the locations of a package that has no file are computed
            # from its parent, which would have to be imported.
            spec = PathFinder.find_spec(part, path if locations is None else locations)
        elif locations is not None and finder in STANDARD_FINDERS:
            continue
        else:
            try:
                spec = finder.find_spec(name, locations)
            except Exception:  # an odd name, with which the import ends in the same way
                return None
        if spec is not None:
            return spec
    return None


def _hash(path: Path) -> str:
    """The SHA-256 of a file. For a module in an archive, that of the archive.

    Raises:
        OSError: the file cannot be read.
    """
    file = next((x for x in (path, *path.parents) if x.is_file()), None)
    if file is None:
        raise FileNotFoundError(f"{path} is not a file")
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _entry(path: Path, content: str) -> Path:
    """The record of a file with this path and this SHA-256 of its content."""
    name = hashlib.sha256(os.fsencode(path) + b"\0" + content.encode()).hexdigest()
    return state_folder() / "trusted" / f"{name}.json"
