"""GitHub Markdown: a pipe table, its caption as a list, the commands as a code block."""

from __future__ import annotations

from lkspec.reporting.model import Table
from lkspec.reporting.renderers.text import column_name, row_header, row_labels, stacked


def render(table: Table) -> str:
    """The table with everything that belongs to it."""
    heads = [
        "<br>".join(column_name(key, text) for key, text in zip(table.column_keys, column, strict=True))
        for column in table.columns
    ]
    names = row_header(table)
    lines = [f"**{table.title}**", "", _line([*names, *heads]), "|---" * len(names) + "|--:" * len(heads) + "|"]
    for row in table.rows:
        lines.append(
            _line([*row_labels(row, table), *(stacked(cell, table.digits_of(row), "<br>") for cell in row.cells)])
        )
    lines += ["", *(f"- {sentence}" for sentence in table.caption)]
    if table.commands:
        lines += ["", "Missing cells, and what fills them:", "", "```"]
        lines += [f"{command}  # [{index}]" for index, command in enumerate(table.commands, start=1)]
        lines.append("```")
    return "\n".join(lines) + "\n"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
