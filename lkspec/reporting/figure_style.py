"""How figures look: plain PNGs that read well at 800 px wide, drawn without a display.

Colours are Okabe and Ito's, told apart by readers with any colour vision; markers say the same a second time.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lkspec.files import atomic_path

WIDTH_INCHES, DPI = 8.0, 200  # 1600 px: sharp when shown at 800

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#8C8C8C"
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.labelsize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#4D4D4D",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#E5E5E5",
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.6,
    "lines.markersize": 5.5,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "legend.handlelength": 1.8,
    "figure.titlesize": 11,
}


def line_colour(index: int) -> str:
    """The colour of line number ``index``."""
    return COLOURS[index % len(COLOURS)]


def line_marker(index: int) -> str:
    """Its marker."""
    return MARKERS[index % len(MARKERS)]


@contextmanager
def panels(titles: Sequence[str]) -> Iterator[tuple[Figure, Sequence[Axes]]]:
    """A figure with a panel per title, side by side with one vertical axis; what is drawn within has the style."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_INCHES, 4.2), dpi=DPI, layout="constrained")
        grid = figure.subplots(1, len(titles), sharey=True, squeeze=False)[0]
        for axes, title in zip(grid, titles, strict=True):
            axes.set_title(title)
        yield figure, grid


def draw_line(
    axes: Axes, x: Sequence[float], y: Sequence[float], low: Sequence[float], high: Sequence[float], **look: Any
) -> None:
    """A line with upright bars for the intervals, where they are known.

    No errorbar(): an interval need not hold its estimate, and nan draws nothing.
    """
    axes.plot(x, y, **look)
    axes.vlines(x, low, high, color=look["color"], linewidth=1.2)


def png(figure: Figure, **options: Any) -> bytes:
    """The content of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", **options)
    return buffer.getvalue()


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(png(figure))
