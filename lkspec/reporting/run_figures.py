"""The figures that a run keeps of itself: tau over K, acceptance per position, alpha over time."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from lkspec.reporting.figure_style import GREY, draw_line, line_colour, line_marker, panels, save
from lkspec.runs.folder import RunFolder
from lkspec.runs.rows import ResultRow

History = Sequence[tuple[int, Sequence[float]]]  # (step, [alpha_1 .. alpha_K]) in the order of the steps
_BEFORE: dict[str, Any] = {"color": GREY, "linestyle": "--", "linewidth": 1.2}
_RING: dict[str, Any] = {"linestyle": "", "marker": "o", "markersize": 9, "fillstyle": "none"}


def draw_run(folder: RunFolder) -> None:
    """Draws the run's figures from its own files."""
    rows = [row for row in folder.read_results() if row.engine == "lkspec" and row.sharpness == 1]
    before, newest = (
        {(row.benchmark, row.temperature, row.num_draft_tokens): row for row in rows if (row.steps > 0) == trained}
        for trained in (False, True)
    )
    if not newest:  # a checkpoint that was not trained here
        before, newest = {}, before
    if newest:
        measured = list(newest.values())
        over_k = tau_over_k_figure(_with_walks(measured), before=list(before.values()))
        save(over_k, folder.figures_dir / "tau_over_k.png")
        save(acceptance_per_position_figure(measured), folder.figures_dir / "acceptance_per_position.png")
    if history := folder.read_depth_history("train/alpha"):
        over_time = alpha_over_time_figure(history, folder.read_depth_history("val/T1/alpha"))
        save(over_time, folder.figures_dir / "alpha_over_time.png")


def _with_walks(rows: Sequence[ResultRow]) -> list[ResultRow]:
    """The rows and, for every smaller K that was not measured, a row that holds only the walk along the same text."""
    found = {}
    for row in sorted(rows, key=lambda row: row.num_draft_tokens):
        for depth, tau in enumerate(json.loads(row.walk_over_k), start=1):
            walk = replace(row, num_draft_tokens=depth, tau=math.nan, low=math.nan, high=math.nan, walk_tau=tau)
            found[row.benchmark, row.temperature, depth] = walk
    return list((found | {(row.benchmark, row.temperature, row.num_draft_tokens): row for row in rows}).values())


def tau_over_k_figure(rows: Sequence[ResultRow], *, before: Sequence[ResultRow] = ()) -> Figure:
    """Acceptance length over num_draft_tokens: a panel per temperature, a line per benchmark, bars for the intervals.

    Args:
        rows: of one run, at most one per benchmark, temperature and num_draft_tokens.
        before: the same before training, drawn grey and dashed.
    """
    with _by_temperature(rows) as (figure, grid, handles):
        for axes, temperature in grid:
            for index, benchmark in enumerate(handles):
                old, new = (_points(some, benchmark, temperature) for some in (before, rows))
                axes.plot(
                    [row.num_draft_tokens for row in old],
                    [row.tau for row in old],
                    marker=line_marker(index),
                    markersize=4,
                    **_BEFORE,
                )
                # Intervals side by side, not on top of each other.
                x = [row.num_draft_tokens + 0.07 * (index - (len(handles) - 1) / 2) for row in new]
                y, low, high = ([getattr(row, name) for row in new] for name in ("tau", "low", "high"))
                draw_line(axes, x, y, low, high, color=line_colour(index), marker=line_marker(index))
                walk = [math.nan if row.walk_tau is None else row.walk_tau for row in new]
                axes.plot(x, walk, color=line_colour(index), markeredgewidth=1.1, **_RING)
            axes.set_xticks(sorted({row.num_draft_tokens for row in [*rows, *before]}))
            axes.set_xlabel("drafted tokens a round, K")
        first = figure.axes[0]
        first.set_ylabel("acceptance length τ (tokens a round)")
        bottom, top = first.get_ylim()
        first.set_ylim(min(1.0, bottom), top + 0.05 * (top - 1))
        if any(row.low < row.high for row in rows):
            handles["interval of τ"] = {"color": GREY, "linestyle": "", "marker": "|", "markersize": 11}
        if any(row.walk_tau is not None and math.isfinite(row.walk_tau) for row in rows):
            handles["walk estimate"] = {"color": GREY, **_RING}
        if before:
            handles["before training"] = _BEFORE
    return figure


def acceptance_per_position_figure(rows: Sequence[ResultRow]) -> Figure:
    """Share of the rounds with at least k accepted tokens over the position k, taken from each line's largest K.

    Args:
        rows: of one run, at most one per benchmark, temperature and num_draft_tokens.
    """
    with _by_temperature(rows) as (figure, grid, handles):
        for axes, temperature in grid:
            for benchmark, look in handles.items():
                for row in _points(rows, benchmark, temperature)[-1:]:
                    axes.plot(range(1, len(row.alpha) + 1), row.alpha, clip_on=False, **look)
            axes.set_xlabel("position k of the drafted token")
            axes.set_xticks(range(1, max(len(row.alpha) for row in rows) + 1))
        figure.axes[0].set(ylabel="share of rounds with ≥ k accepted", ylim=(0, 1))
    return figure


def alpha_over_time_figure(history: History, validation: History = ()) -> Figure:
    """Mean acceptance rate alpha of each depth over training steps: training as lines, validation as points.

    Args:
        history: on the training batches.
        validation: on held-out text.
    """
    num_depths = len(history[0][1])
    # Depth is ordered, so its colours are too: dark to light along a map that is monotonous in lightness.
    colours = matplotlib.colormaps["viridis"](np.linspace(0.0, 0.85, num_depths))
    with panels([""]) as (figure, (axes,)):
        for depth, colour in enumerate(colours):
            line, points = (
                ([step for step, _ in h], [alphas[depth] for _, alphas in h]) for h in (history, validation)
            )
            axes.plot(*line, color=colour, linewidth=1.3, marker="" if len(history) > 1 else "_")
            look = {"color": colour, "linestyle": "", "marker": "o", "markeredgecolor": "white"}
            axes.plot(*points, zorder=3, clip_on=False, **look)
        axes.set(xlabel="training step", ylabel="mean acceptance rate α (0 to 1)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_ylim(bottom=0)
        handles: dict[str, Any] = {f"depth {k}": {"color": colour} for k, colour in enumerate(colours, start=1)}
        if validation:
            handles["validation"] = {"color": GREY, "linestyle": "", "marker": "o"}
        _legend(figure, handles)
    return figure


@contextmanager
def _by_temperature(
    rows: Sequence[ResultRow],
) -> Iterator[tuple[Figure, list[tuple[Axes, float]], dict[str, dict[str, Any]]]]:
    """A figure with a panel per temperature, and its legend, which starts with a look for each benchmark."""
    temperatures = sorted({row.temperature for row in rows})
    benchmarks = dict.fromkeys(row.benchmark for row in rows)
    handles = {
        name: {"color": line_colour(index), "marker": line_marker(index)} for index, name in enumerate(benchmarks)
    }
    with panels([f"T = {temperature:g}" for temperature in temperatures]) as (figure, grid):
        figure.suptitle(f"{rows[0].draft}, {rows[0].loss}, {rows[0].target}")
        yield figure, list(zip(grid, temperatures, strict=True)), handles
        _legend(figure, handles)


def _points(rows: Sequence[ResultRow], benchmark: str, temperature: float) -> list[ResultRow]:
    chosen = (row for row in rows if row.benchmark == benchmark and row.temperature == temperature)
    return sorted(chosen, key=lambda row: row.num_draft_tokens)


def _legend(figure: Figure, handles: dict[str, dict[str, Any]]) -> None:
    lines = [Line2D([], [], label=name, **look) for name, look in handles.items()]
    figure.legend(handles=lines, loc="outside right upper")
