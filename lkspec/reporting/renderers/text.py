"""How numbers are written, in every format."""

from __future__ import annotations

import math

from lkspec.reporting.intervals import Estimate
from lkspec.reporting.model import Cell, Row, Table


def number(estimate: Estimate, digits: int, *, signed: bool = False, plus_minus: str = "±") -> str:
    """``1.386 ±0.012``; no interval where there is none."""
    value = f"{estimate.value:+.{digits}f}" if signed else f"{estimate.value:.{digits}f}"
    return f"{value} {plus_minus}{estimate.half_width:.{digits}f}" if math.isfinite(estimate.half_width) else value


def stacked(cell: Cell, digits: int, line_break: str) -> str:
    """An estimate with its gain below, between asterisks where that is resolved; or what stands in an empty cell."""
    if cell.estimate is None:
        return missing(cell)
    text = number(cell.estimate, digits)
    if cell.gain is None:
        return text
    gain = number(cell.gain, digits, signed=True)
    return f"{text}{line_break}{f'**{gain}**' if cell.is_resolved else gain}"


def missing(cell: Cell) -> str:
    """What stands in an empty cell: the numbers of the commands that fill it."""
    return f"missing [{', '.join(map(str, cell.missing))}]" if cell.missing else "-"


def row_labels(row: Row, table: Table) -> list[str]:
    """Labels of a row, and where its numbers come from when the table also shows the paper's."""
    return [*row.labels, *([row.source] if table.has_paper else [])]


def row_header(table: Table) -> list[str]:
    """The names above ``row_labels``."""
    return [*table.row_keys, *(["source"] if table.has_paper else [])]


def column_name(key: str, text: str) -> str:
    """A column's label; bare numbers say what they are."""
    return {"temperature": f"T = {text}", "num_draft_tokens": f"K = {text}", "depth": f"depth {text}"}.get(key, text)
