"""An HTML page of headings, texts, tables and figures, from the template ``page.html``.

Images and films are embedded, so the page loads nothing from the network.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

TYPES = {".png": "image/png", ".gif": "image/gif", ".mp4": "video/mp4"}
# A part of a page: h2, h3, p or pre with a text, details with a summary and a text, table with a
# `Table`, or figure with a `Figure`.
Part = tuple[str, Any]


class Figure(NamedTuple):
    """An image or a film."""

    suffix: str  # of its file, a key of TYPES
    content: bytes
    caption: str
    wide: bool = False  # as wide as the page

    @property
    def source(self) -> str:
        """The content as a URL."""
        return f"data:{TYPES[self.suffix]};base64,{base64.b64encode(self.content).decode()}"


def page(title: str, parts: Sequence[Part]) -> str:
    """The text of the page. All texts are escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("page.html").render(title=title, parts=parts)
