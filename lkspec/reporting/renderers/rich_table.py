"""A table for a terminal or a log."""

from __future__ import annotations

from collections.abc import Iterator

import rich.table

from lkspec.reporting.model import Table
from lkspec.reporting.renderers.text import column_name, row_header, row_labels, stacked
from lkspec.reporting.terminal import console


def render(table: Table) -> Iterator[rich.table.Table | str]:
    """Estimates, each with its gain below, bold as in Markdown where that is resolved; then the caption."""
    shown = rich.table.Table(title=table.title, title_justify="left")
    for name in row_header(table):
        shown.add_column(name)
    for column in table.columns:
        names = (column_name(key, text) for key, text in zip(table.column_keys, column, strict=True))
        shown.add_column("\n".join(names), justify="right")
    for row in table.rows:
        shown.add_row(*row_labels(row, table), *(stacked(cell, table.digits_of(row), "\n") for cell in row.cells))
    yield shown
    yield from table.caption


def show(table: Table) -> None:
    """Prints it."""
    for part in render(table):
        console.print(part, soft_wrap=isinstance(part, str), highlight=False, markup=False)
