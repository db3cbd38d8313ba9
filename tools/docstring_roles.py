"""An extension of griffe: docstrings without the roles of reStructuredText, for the site.

Docstrings use ``:func:`name``` for references, and ``::`` before literal blocks. Markdown would
show both as plain text.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:attr|class|func|meth|mod):`~?([^`]+)`")
BLOCK = re.compile(r"(^|\S)::$", re.MULTILINE)


class DocstringRoles(griffe.Extension):
    """Replace roles by code, and ``::`` by a colon, or by nothing if it stands alone."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            text = ROLE.sub(r"`\1`", obj.docstring.value)
            obj.docstring.value = BLOCK.sub(lambda m: f"{m[1]}:" if m[1] else "", text)
