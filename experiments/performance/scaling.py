"""How time and memory of the loss region grow with depths, vocabulary and rows: the package against an eager loss.

python experiments/performance/scaling.py
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import torch
from contestants import both_passes, eager_lk_lambda, fused, make_case
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from measuring import MIB, interleaved_seconds, peak_bytes, print_table, write_csv

from lkspec.losses.objectives import KL, LKLambda
from lkspec.reporting.figure_style import DPI, STYLE, WIDTH_INCHES, line_colour, line_marker, save

NUM_THREADS = 2
HIDDEN = 64  # small, so that what is not a product shows
AXES = {"K": "depths K", "V": "vocabulary V = D", "S": "rows of text S"}
#: axis -> [(K, V, S)]
POINTS = {
    "K": [(depths, 8_000, 256) for depths in (1, 2, 3, 4, 5, 6, 7, 8)],
    "V": [(2, vocab, 256) for vocab in (8_000, 16_000, 32_000, 64_000, 152_000)],
    "S": [(1, 8_000, rows) for rows in (256, 512, 1024, 2048, 4096)],
}
#: Slopes of the last points on double logarithmic axes: how the package should grow.
EXPECTED = {
    ("K", "MiB"): "0: depths follow one another",
    ("V", "MiB"): "at most 1: chunks get shorter, down to 256 rows",
    ("S", "MiB"): "0: the chunk's length is capped",
    ("K", "seconds"): "below 1: the target's share is constant",
    ("V", "seconds"): "1",
    ("S", "seconds"): "1",
}
Row = dict[str, object]


def main() -> None:
    torch.set_num_threads(NUM_THREADS)
    rows = [row for axis, points in POINTS.items() for point in points for row in measure(axis, *point)]
    print_table("Time and memory", rows)
    print_table("Slopes of the last points, d log y / d log x", slopes(rows))
    path = Path(__file__)
    write_csv(path.with_suffix(".csv"), rows)
    save(scaling_figure(rows), path.with_suffix(".png"))


def measure(axis: str, num_depths: int, vocab: int, num_rows: int) -> list[Row]:
    """Every contestant at one point."""
    case = make_case(num_rows, HIDDEN, vocab, vocab, num_depths)
    losses = {
        "eager lk_lambda": eager_lk_lambda(case),
        "lk_lambda, recompute": fused(case, LKLambda(), in_forward=False),
        "kl, in forward": fused(case, KL(), in_forward=True),
    }
    contestants = {name: both_passes(case, loss) for name, loss in losses.items()}
    seconds = interleaved_seconds(contestants)
    rows: list[Row] = []
    for name, contestant in contestants.items():
        case.forget_gradients()
        where = {"axis": axis, "K": num_depths, "V": vocab, "S": num_rows}
        rows.append({**where, "contestant": name, "seconds": seconds[name], "MiB": peak_bytes(contestant) / MIB})
    return rows


def slopes(rows: Sequence[Mapping[str, object]]) -> list[Row]:
    """Of each contestant along each axis, over the upper half of its points."""
    found: list[Row] = []
    for (axis, quantity), expected in EXPECTED.items():
        row: Row = {"axis": axis, "quantity": quantity}
        for name in dict.fromkeys(str(r["contestant"]) for r in rows):
            x, y = _series(rows, axis, name, quantity)
            half = len(x) // 2
            row[name] = math.log(y[-1] / y[half]) / math.log(x[-1] / x[half])
        found.append({**row, "expected of the package": expected})
    return found


def scaling_figure(rows: Sequence[Mapping[str, object]]) -> Figure:
    """Memory above, time below; a column an axis."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_INCHES, 5.4), dpi=DPI, layout="constrained")
        panels = figure.subplots(2, len(POINTS), sharey="row", squeeze=False)
        for column, axis in enumerate(POINTS):
            for line, quantity in enumerate(("MiB", "seconds")):
                _draw(panels[line][column], rows, axis, quantity)
            panels[1][column].set_xlabel(AXES[axis])
            (_, vocab, num_rows), (depths, _, _) = POINTS[axis][0], POINTS[axis][-1]
            fixed = {"K": f"V = {vocab:,}, S = {num_rows}", "V": f"K = {depths}, S = {num_rows}", "S": f"K = {depths}"}
            panels[0][column].set_title(fixed[axis] + (f", V = {vocab:,}" if axis == "S" else ""))
        panels[0][0].set_ylabel("peak above inputs (MiB)")
        panels[1][0].set_ylabel("forward and backward (s)")
        handles, labels = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    return figure


def _draw(axes: Axes, rows: Sequence[Mapping[str, object]], axis: str, quantity: str) -> None:
    names = dict.fromkeys(str(row["contestant"]) for row in rows)
    for index, name in enumerate(names):
        x, y = _series(rows, axis, name, quantity)
        axes.plot(x, y, color=line_colour(index), marker=line_marker(index), label=name)
    axes.set_yscale("log")
    ticks = sorted({point["KVS".index(axis)] for point in POINTS[axis]})
    if axis != "K":
        axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick // 1000}k" if tick >= 8_000 else str(tick) for tick in ticks])
    axes.minorticks_off()


def _series(
    rows: Sequence[Mapping[str, object]], axis: str, name: str, quantity: str
) -> tuple[list[float], list[float]]:
    chosen = [row for row in rows if row["axis"] == axis and row["contestant"] == name]
    return [float(str(row[axis])) for row in chosen], [float(str(row[quantity])) for row in chosen]


if __name__ == "__main__":
    main()
