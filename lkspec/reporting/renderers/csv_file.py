"""CSV: a row a cell with every number of it, for other programs."""

from __future__ import annotations

from lkspec.reporting.model import Table


def render(table: Table) -> str:
    """The table, unrounded; the caption is not part of it."""
    return table.frame().to_csv(index=False, lineterminator="\n")
