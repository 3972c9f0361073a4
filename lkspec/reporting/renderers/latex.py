"""LaTeX: a table with booktabs rules."""

from __future__ import annotations

from collections.abc import Sequence

from lkspec.reporting.model import Cell, Table
from lkspec.reporting.renderers.text import missing, number

_ESCAPES = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_ESCAPES |= {character: f"\\{character}" for character in "&%$#_{}"}
_ESCAPES |= {"±": r"$\pm$", "→": r"$\rightarrow$"}


def latex(table: Table) -> str:
    """A ``table`` environment; needs ``\\usepackage{booktabs}``. The commands are comments."""
    names = table.row_header
    lines = [r"\begin{table}", r"\centering", rf"\begin{{tabular}}{{{'l' * len(names)}{'r' * len(table.columns)}}}"]
    lines.append(r"\toprule")
    *groups, last = table.head()
    for line in groups:
        over = [rf"\multicolumn{{{width}}}{{c}}{{{_escaped(name)}}}" for name, width in line]
        lines.append(_line([*[""] * len(names), *over]))
    lines.append(_line([_escaped(name) for name in (*names, *(name for name, _ in last))]))
    previous = None
    for row in table.rows:
        if previous != row.labels[0]:
            lines.append(r"\midrule")
        previous = row.labels[0]
        cells = [_cell(cell, table.digits_of(row)) for cell in row.cells]
        lines.append(_line([*map(_escaped, table.row_labels(row)), *cells]))
    lines += [r"\bottomrule", r"\end{tabular}"]
    lines.append(rf"\caption{{{_escaped(f'{table.title}. ' + ' '.join(table.caption))}}}")
    lines.append(r"\end{table}")
    lines += [f"% missing [{index}]: {command}" for index, command in enumerate(table.commands, start=1)]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return " & ".join(cells) + r" \\"


def _cell(cell: Cell, digits: int) -> str:
    if cell.estimate is None:
        return _escaped(missing(cell))
    text = _escaped(number(cell.estimate, digits))
    if cell.gain is None:
        return text
    gain = _escaped(number(cell.gain, digits, signed=True))
    return rf"{text} (\textbf{{{gain}}})" if cell.is_resolved else f"{text} ({gain})"


def _escaped(text: str) -> str:
    return "".join(_ESCAPES.get(character, character) for character in text.replace("->", "→"))
