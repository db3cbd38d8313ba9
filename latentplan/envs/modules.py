"""The import of the module or file that registers a user's environments."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType

from latentplan.types import UserError


def import_module(module: str) -> None:
    """Import the module or file that registers a user's environments.

    A file can import its neighbours by their names, as in ``python FOLDER/file.py``.

    Raises:
        UserError: it does not exist, or its import fails.
    """
    try:
        if not module.endswith(".py"):
            importlib.import_module(module)
            return
        path = Path(module).resolve()
        name = f"{path.stem}_{hashlib.sha1(str(path).encode()).hexdigest()[:8]}"
        if name in sys.modules:
            return
        loader = _FromSource(name, str(path))
        spec = importlib.util.spec_from_file_location(name, path, loader=loader)
        if spec is None:
            raise ImportError(f"{path} cannot be imported")
        loaded = importlib.util.module_from_spec(spec)
        sys.modules[name] = loaded  # pickle looks up the classes of the module there
        if str(path.parent) not in sys.path:
            sys.path.insert(0, str(path.parent))
        try:
            loader.exec_module(loaded)
        except BaseException:
            del sys.modules[name]
            raise
    except Exception as error:  # a user's code may raise any exception
        raise UserError(
            f"env.module={module} could not be imported: {type(error).__name__}: {error}"
        ) from error


class _FromSource(SourceFileLoader):
    """Compiles a file each time it is imported.

    Compiled code in ``__pycache__`` beside the file may say anything, and only the file is compared
    with the record of trusted files.
    """

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        return self.source_to_code(self.get_data(path), path)
