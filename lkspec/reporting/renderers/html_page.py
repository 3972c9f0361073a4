"""One self-contained HTML page: the table, its gains as a picture, its caption, the commands."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence

from lkspec.reporting.figure_style import png
from lkspec.reporting.figures import gains_figure
from lkspec.reporting.model import PAPER, Cell, Table, TableRow
from lkspec.reporting.renderers.text import missing, number

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 96rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.25rem; } h2 { font-size: 1rem; margin-top: 1.6rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; text-align: right; white-space: nowrap; vertical-align: top; }
th { font-weight: 600; } th.row { text-align: left; font-weight: 400; }
thead th { border-bottom: 1px solid #999; } thead th.group { text-align: center; }
tbody tr.first th, tbody tr.first td { border-top: 1px solid #ddd; }
.half { color: #777; font-size: .85em; } .gain { display: block; font-size: .9em; }
.resolved { font-weight: 700; color: #005a8c; } .resolved.worse { color: #a63c00; }
tr.paper th, tr.paper td { color: #777; font-style: italic; }
.missing { color: #a63c00; font-size: .85em; } img { max-width: 100%; }
li { margin: .2rem 0; } pre { background: #f6f6f6; padding: .7rem; overflow-x: auto; font-size: .85rem; }
"""


def html_page(table: Table) -> str:
    """The page; pictures are inside it and nothing is loaded."""
    figure = gains_figure(table)
    picture = commands = ""
    if figure is not None:
        data = base64.b64encode(png(figure)).decode()
        picture = f'<h2>Gains</h2><img alt="gains over the baseline" src="data:image/png;base64,{data}">'
    if table.commands:
        numbered = (f"{html.escape(text)}  # [{index}]" for index, text in enumerate(table.commands, start=1))
        commands = f"<h2>Missing cells, and what fills them</h2><pre>{chr(10).join(numbered)}</pre>"
    title = html.escape(table.title)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{_STYLE}</style></head><body>
<h1>{title}</h1>
{fragment(table)}
{picture}
{commands}
</body></html>
"""


def fragment(table: Table) -> str:
    """The table and its caption alone, for a page with another style."""
    sentences = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in table.caption)
    return f"""<div class="scroll"><table>
<thead>{_head(table)}</thead>
<tbody>
{_body(table)}
</tbody></table></div>
<ul>{sentences}</ul>"""


def _head(table: Table) -> str:
    lines = []
    *groups, last = table.head()
    for line in groups:
        over = "".join(f'<th class="group" colspan="{width}">{html.escape(name)}</th>' for name, width in line)
        lines.append('<th class="row"></th>' * len(table.row_header) + over)
    lines.append(_row_heads(table.row_header) + "".join(f"<th>{html.escape(name)}</th>" for name, _ in last))
    return "".join(f"<tr>{line}</tr>" for line in lines)


def _body(table: Table) -> str:
    lines, previous = [], ""
    for row in table.rows:
        classes = [*(["first"] if row.labels[0] != previous else []), *(["paper"] if row.source == PAPER else [])]
        previous = row.labels[0]
        cells = "".join(_cell(cell, row, table.digits_of(row)) for cell in row.cells)
        lines.append(f'<tr class="{" ".join(classes)}">{_row_heads(table.row_labels(row))}{cells}</tr>')
    return "\n".join(lines)


def _row_heads(texts: Sequence[str]) -> str:
    return "".join(f'<th class="row">{html.escape(text)}</th>' for text in texts)


def _cell(cell: Cell, row: TableRow, digits: int) -> str:
    if cell.estimate is None:
        return f'<td class="missing">{html.escape(missing(cell) if row.source != PAPER else "")}</td>'
    value, _, half = number(cell.estimate, digits).partition(" ")
    text = f'{value} <span class="half">{half}</span>'
    if cell.gain is not None:
        kind = "gain" + (" resolved" if cell.is_resolved else "") + (" worse" if cell.gain.value < 0 else "")
        gain = number(cell.gain, digits, signed=True)
        text += f'<span class="{kind}">{f"<b>{gain}</b>" if cell.is_resolved else gain}</span>'
    tip = "" if row.source == PAPER else f"{cell.estimate.num_seeds} seeds, {cell.estimate.num_groups} prompts"
    return f'<td title="{tip}">{text}</td>'
