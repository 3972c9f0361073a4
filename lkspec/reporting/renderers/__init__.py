"""The formats of a table, by name."""

from __future__ import annotations

from collections.abc import Callable

from lkspec.reporting.model import Table
from lkspec.reporting.renderers.html_page import html_page
from lkspec.reporting.renderers.latex import latex
from lkspec.reporting.renderers.text import markdown

RENDERERS: dict[str, Callable[[Table], str]] = {
    "markdown": markdown,
    "csv": lambda table: str(table.frame().to_csv(index=False, lineterminator="\n")),  # every number, unrounded
    "latex": latex,
    "html": html_page,
}
