"""How figures look: plain PNGs that read well at 800 px wide, drawn without a display.

Colours are Okabe and Ito's, told apart by readers with any colour vision; markers say the same a second time.
"""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from lkspec.files import atomic_path

WIDTH_INCHES, DPI = 8.0, 200  # 1600 px: sharp when shown at 800

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#8C8C8C"
STYLE = {
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


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG, atomically."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
