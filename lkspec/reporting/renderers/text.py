"""How numbers are written in every format, and the formats of plain text: Markdown and a terminal's."""

from __future__ import annotations

import math

from lkspec.reporting import terminal
from lkspec.reporting.intervals import Estimate
from lkspec.reporting.model import Cell, Table


def number(estimate: Estimate, digits: int, *, signed: bool = False) -> str:
    """``1.386 ±0.012``; no interval where there is none."""
    value = f"{estimate.value:+.{digits}f}" if signed else f"{estimate.value:.{digits}f}"
    return f"{value} ±{estimate.half_width:.{digits}f}" if math.isfinite(estimate.half_width) else value


def missing(cell: Cell) -> str:
    """What stands in an empty cell: the numbers of the commands that fill it."""
    return f"missing [{', '.join(map(str, cell.missing))}]" if cell.missing else "-"


def markdown(table: Table) -> str:
    """GitHub's: a pipe table, its caption as a list, the commands as a code block."""
    heads, rows = _texts(table, "<br>")
    marks = ["---"] * len(table.row_header) + ["--:"] * len(table.columns)
    lines = [f"**{table.title}**", "", _line(heads), f"|{'|'.join(marks)}|", *map(_line, rows)]
    lines += ["", *(f"- {sentence}" for sentence in table.caption)]
    if table.commands:
        lines += ["", "Missing cells, and what fills them:", "", "```"]
        lines += [f"{command}  # [{index}]" for index, command in enumerate(table.commands, start=1)]
        lines.append("```")
    return "\n".join(lines) + "\n"


def show(table: Table) -> None:
    """Prints a table and its caption."""
    terminal.table(table.title, *_texts(table, "\n"), left=table.row_header)
    for sentence in table.caption:
        terminal.say(sentence)


def _texts(table: Table, line_break: str) -> tuple[list[str], list[list[str]]]:
    """The head and the rows of a table."""
    heads = [*table.row_header, *(line_break.join(table.column_names(column)) for column in table.columns)]
    rows = [
        [*table.row_labels(row), *(_cell(cell, table.digits_of(row), line_break) for cell in row.cells)]
        for row in table.rows
    ]
    return heads, rows


def _cell(cell: Cell, digits: int, line_break: str) -> str:
    """An estimate with its gain below, between asterisks where that is resolved; or what stands in an empty cell."""
    if cell.estimate is None:
        return missing(cell)
    text = number(cell.estimate, digits)
    if cell.gain is None:
        return text
    gain = number(cell.gain, digits, signed=True)
    return f"{text}{line_break}{f'**{gain}**' if cell.is_resolved else gain}"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
