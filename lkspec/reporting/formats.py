"""The formats of a table, by name."""

from __future__ import annotations

from collections.abc import Callable

from lkspec.reporting.model import Table
from lkspec.reporting.renderers import csv_file, html_page, latex, markdown

RENDERERS: dict[str, Callable[[Table], str]] = {
    "markdown": markdown.render,
    "csv": csv_file.render,
    "latex": latex.render,
    "html": html_page.render,
}
