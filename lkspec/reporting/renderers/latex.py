"""LaTeX: a table with booktabs rules."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from lkspec.reporting.model import Cell, Table
from lkspec.reporting.renderers.text import column_name, missing, number, row_header, row_labels

_ESCAPES = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_ESCAPES |= {character: f"\\{character}" for character in "&%$#_{}"}
_SIGNS = {"±": r"$\pm$", "->": r"$\rightarrow$"}


def render(table: Table) -> str:
    """A ``table`` environment; needs ``\\usepackage{booktabs}``. The commands are comments."""
    names = row_header(table)
    lines = [r"\begin{table}", r"\centering", rf"\begin{{tabular}}{{{'l' * len(names)}{'r' * len(table.columns)}}}"]
    lines += [r"\toprule", *_head(table, names), r"\midrule"]
    previous: tuple[str, ...] | None = None
    for row in table.rows:
        if previous is not None and previous[0] != row.labels[0]:
            lines.append(r"\midrule")
        previous = row.labels
        lines.append(
            _line([*map(_escaped, row_labels(row, table)), *(_cell(cell, table.digits_of(row)) for cell in row.cells)])
        )
    lines += [r"\bottomrule", r"\end{tabular}"]
    lines.append(rf"\caption{{{_escaped(f'{table.title}. ' + ' '.join(table.caption))}}}")
    lines.append(r"\end{table}")
    lines += [f"% missing [{index}]: {command}" for index, command in enumerate(table.commands, start=1)]
    return "\n".join(lines) + "\n"


def _head(table: Table, names: Sequence[str]) -> list[str]:
    """A line a column key; equal neighbours share a cell, except in the last line."""
    lines = []
    for level, key in enumerate(table.column_keys):
        texts = [column[: level + 1] for column in table.columns]
        last = level == len(table.column_keys) - 1
        cells = [_escaped(name) if last else "" for name in names]
        for labels, group in itertools.groupby(texts):
            text, width = _escaped(column_name(key, labels[-1])), len(list(group))
            cells += [text] * width if last else [rf"\multicolumn{{{width}}}{{c}}{{{text}}}"]
        lines.append(_line(cells))
    return lines


def _line(cells: Sequence[str]) -> str:
    return " & ".join(cells) + r" \\"


def _cell(cell: Cell, digits: int) -> str:
    if cell.estimate is None:
        return _escaped(missing(cell))
    text = _escaped(number(cell.estimate, digits))
    if cell.gain is None:
        return text
    gain = _escaped(number(cell.gain, digits, signed=True))
    if cell.is_resolved:
        gain = rf"\textbf{{{gain}}}"
    return f"{text} ({gain})"


def _escaped(text: str) -> str:
    text = "".join(_ESCAPES.get(character, character) for character in text)
    for sign, command in _SIGNS.items():
        text = text.replace(sign, command)
    return text
