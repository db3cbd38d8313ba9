"""An extension of griffe: docstrings without the roles of reStructuredText, for the site.

Docstrings write ``:func:`name```, and a literal block after ``::``. Markdown would show both as
they are.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:attr|class|func|meth|mod):`~?([^`]+)`")
BLOCK = re.compile(r"(^|\S)::$", re.MULTILINE)


class DocstringRoles(griffe.Extension):
    """Replace roles by code, and the mark of a literal block by a colon or nothing."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            text = ROLE.sub(r"`\1`", obj.docstring.value)
            obj.docstring.value = BLOCK.sub(lambda m: f"{m[1]}:" if m[1] else "", text)
