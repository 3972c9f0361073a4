"""Tables as pictures: lines over the last column key, and gains with their intervals.

Figure 1 of the paper (tau over K) is a table whose last column key is ``num_draft_tokens``. A smaller K cannot in
general be read off the rounds of a larger one: a round that accepted more than K tokens would have ended earlier, and
the next one would have begun where the longer round was never tried. Cutting is exact only where no round accepted
more than K, at T = 0 (at T > 0 to look for that is to choose rounds by their outcome). So tau is decoded at each K
(``num_draft_tokens=[1,2,3,4,5,6,7]``); the walk has every K at once, and along greedy answers it is that decoding
without the rounds that reach past the end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from textwrap import fill
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lkspec.reporting.figure_style import DPI, GREY, STYLE, WIDTH_INCHES, draw_line, line_colour, line_marker, panels
from lkspec.reporting.model import OURS, Table, TableRow

_LABEL_CHARACTERS = 45  # of a line of the vertical label
_ASIDE = 0.04  # from one line to the next, as a share of the smallest step of the last column key
_PANELS_INCHES, _CHARACTER_INCHES = 5.5, 0.08  # the width of all panels, and of a character below them


def lines_figure(table: Table) -> Figure:
    """Each row a line over the numbers of the last column key; a panel for every other label of the columns.

    Ours are solid with bars for the intervals, the paper's dashed; each stands a little aside, so that no bar hides.

    Raises:
        ValueError: the last column key is not a number.
    """
    key = table.column_keys[-1]
    try:
        places = [float(column[-1]) for column in table.columns]
    except ValueError:
        raise ValueError(
            f"a figure draws lines over the last of columns, which must be numbers (num_draft_tokens, depth); "
            f"{key} has {', '.join(dict.fromkeys(column[-1] for column in table.columns))}"
        ) from None
    rows = [row for row in table.rows if any(cell.estimate is not None for cell in row.cells)]
    looks = _looks(rows)
    groups = list(dict.fromkeys(column[:-1] for column in table.columns))
    ordered = sorted(set(places))
    step = min((after - before for before, after in pairwise(ordered)), default=1.0)
    titles = [", ".join(table.column_names(group)) for group in groups]
    with panels(titles) as (figure, grid):
        for axes, group in zip(grid, groups, strict=True):
            chosen = [index for index, column in enumerate(table.columns) if column[:-1] == group]
            for index, row in enumerate(rows):
                aside = _ASIDE * step * (index - (len(rows) - 1) / 2)
                known = [(places[i] + aside, e) for i in chosen if (e := row.cells[i].estimate) is not None]
                x, y = [place for place, _ in known], [e.value for _, e in known]
                draw_line(axes, x, y, [e.low for _, e in known], [e.high for _, e in known], **looks[index])
            ticks = sorted({places[i] for i in chosen})
            axes.set_xticks(ticks, _tick_labels(ticks, _PANELS_INCHES / len(groups)))
        figure.supxlabel({"num_draft_tokens": "drafted tokens a round, K", "depth": "depth k"}.get(key, key))
        grid[0].set_ylabel(fill(table.title, _LABEL_CHARACTERS))
        names = [", ".join(row.labels) + ("" if row.source == OURS else " (paper)") for row in rows]
        handles = [Line2D([], [], label=name, **look) for name, look in zip(names, looks, strict=True)]
        figure.legend(handles=handles, loc="outside right upper")
    return figure


def _tick_labels(ticks: Sequence[float], inches: float) -> list[str]:
    """What stands below an axis of this width: of labels that would touch the one before, nothing."""
    labels: list[str] = []
    free = -math.inf
    for tick in ticks:
        label = f"{tick:g}"
        half = len(label) * _CHARACTER_INCHES / 2
        place = inches * (tick - ticks[0]) / max(ticks[-1] - ticks[0], 1e-9)
        labels.append(label if place - half >= free else "")
        free = place + half + _CHARACTER_INCHES if labels[-1] else free
    return labels


def _looks(rows: Sequence[TableRow]) -> list[dict[str, Any]]:
    """Colours by the first row key and markers by the others; both by the one of them that alone tells rows apart."""
    firsts = list(dict.fromkeys(row.labels[:1] for row in rows))
    rests = list(dict.fromkeys(row.labels[1:] for row in rows))
    looks = []
    for row in rows:
        colour, marker = firsts.index(row.labels[:1]), rests.index(row.labels[1:])
        colour = marker if len(firsts) == 1 else colour
        marker = colour if len(rests) == 1 else marker
        style = "-" if row.source == OURS else "--"
        looks.append({"color": line_colour(colour), "marker": line_marker(marker), "linestyle": style})
    return looks


def gains_figure(table: Table) -> Figure | None:
    """Every gain of ours with its interval, a line per cell, a panel per row of the table; None without any."""
    rows = [row for row in table.rows if row.source == OURS and any(cell.gain is not None for cell in row.cells)]
    if not rows:
        return None
    names = [", ".join(table.column_names(column)) for column in table.columns]
    with matplotlib.rc_context({**STYLE, "axes.grid.axis": "x"}):
        height = 0.7 + 0.24 * len(rows) * len(names) + 0.45 * len(rows)
        figure = Figure(figsize=(WIDTH_INCHES, height), dpi=DPI / 2, layout="constrained")
        grid = figure.subplots(len(rows), 1, sharex=True, squeeze=False)[:, 0]
        for index, (axes, row) in enumerate(zip(grid, rows, strict=True)):
            for place, cell in enumerate(row.cells):
                if cell.gain is not None:
                    colour = line_colour(index) if cell.is_resolved else GREY
                    axes.plot(cell.gain.value, place, marker="o", color=colour)
                    axes.hlines(place, cell.gain.low, cell.gain.high, color=colour)
            axes.axvline(0.0, color="#4D4D4D", linewidth=0.8)
            axes.set_yticks(range(len(names)), names)
            axes.set_ylim(len(names) - 0.5, -0.5)
            axes.set_title(", ".join(row.labels), loc="left")
        grid[-1].set_xlabel("gain over the baseline (coloured: the interval excludes 0)")
    return figure
