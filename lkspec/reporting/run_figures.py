"""Figures of results."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from lkspec.reporting.figure_style import DPI, GREY, STYLE, WIDTH_INCHES, line_colour, line_marker, save
from lkspec.runs.rows import ResultRow


def plot_tau_over_k(
    rows: Sequence[ResultRow], path: Path, *, before: Sequence[ResultRow] = (), title: str | None = None
) -> None:
    """Draws the acceptance length over the number of drafted tokens: see ``tau_over_k_figure``."""
    save(tau_over_k_figure(rows, before=before, title=title), path)


def plot_acceptance_per_position(rows: Sequence[ResultRow], path: Path, *, title: str | None = None) -> None:
    """Draws the share of rounds that accept each drafted position: see ``acceptance_per_position_figure``."""
    save(acceptance_per_position_figure(rows, title=title), path)


def plot_alpha_over_time(
    history: Sequence[tuple[int, Sequence[float]]],
    path: Path,
    *,
    validation: Sequence[tuple[int, Sequence[float]]] = (),
    title: str = "",
) -> None:
    """Draws alpha per depth over training: see ``alpha_over_time_figure``."""
    save(alpha_over_time_figure(history, validation=validation, title=title), path)


def tau_over_k_figure(
    rows: Sequence[ResultRow], *, before: Sequence[ResultRow] = (), title: str | None = None
) -> Figure:
    """Acceptance length over num_draft_tokens: a panel a temperature, a line a benchmark, bars for the intervals.

    Args:
        rows: of one run and engine, at most one a benchmark, temperature and num_draft_tokens.
        before: the same before training, drawn grey and dashed.
        title: over the figure; draft, loss and target of the rows when not given.

    Raises:
        ValueError: no rows, or two for the same point.
    """
    _check_rows(rows)
    benchmarks = _benchmarks(rows)
    with _panels(rows, title) as (figure, panels):
        for temperature, axes in panels.items():
            for index, benchmark in enumerate(benchmarks):
                shift = 0.07 * (index - (len(benchmarks) - 1) / 2)  # intervals side by side, not on top of each other
                x, tau = _xy(_points(before, benchmark, temperature), 0.0)
                axes.plot(x, tau, color=GREY, linestyle="--", linewidth=1.2, marker=line_marker(index), markersize=4)
                _draw_measured(axes, _points(rows, benchmark, temperature), index, shift)
            axes.set_xticks(sorted({row.num_draft_tokens for row in [*rows, *before]}))
            axes.set_xlabel("drafted tokens a round, K")
        first = next(iter(panels.values()))
        first.set_ylabel("acceptance length τ (tokens a round)")
        bottom, top = first.get_ylim()
        first.set_ylim(min(1.0, bottom), top + 0.05 * (top - 1))
        handles = _benchmark_handles(benchmarks)
        if any(row.low < row.high for row in rows):
            handles.append(Line2D([], [], color=GREY, linestyle="", marker="|", markersize=11, label="interval of τ"))
        if any(row.walk_tau is not None and np.isfinite(row.walk_tau) for row in rows):
            handles.append(_ring("walk estimate"))
        if before:
            handles.append(Line2D([], [], color=GREY, linestyle="--", linewidth=1.2, label="before training"))
        _legend(figure, handles)
    return figure


def acceptance_per_position_figure(rows: Sequence[ResultRow], *, title: str | None = None) -> Figure:
    """Share of the rounds with at least k accepted tokens over the position k, taken from each line's largest K.

    Args:
        rows: of one run and engine, at most one a benchmark, temperature and num_draft_tokens.
        title: over the figure; draft, loss and target of the rows when not given.

    Raises:
        ValueError: no rows, or two for the same point.
    """
    _check_rows(rows)
    benchmarks = _benchmarks(rows)
    with _panels(rows, title) as (figure, panels):
        for temperature, axes in panels.items():
            for index, benchmark in enumerate(benchmarks):
                for row in _points(rows, benchmark, temperature)[-1:]:
                    positions = np.arange(1, len(row.alpha) + 1)
                    axes.plot(positions, row.alpha, color=line_colour(index), marker=line_marker(index), clip_on=False)
            axes.set_xlabel("position k of the drafted token")
            axes.set_xticks(range(1, max(len(row.alpha) for row in rows) + 1))
        first = next(iter(panels.values()))
        first.set_ylabel("share of rounds with ≥ k accepted")
        first.set_ylim(0, 1)
        _legend(figure, _benchmark_handles(benchmarks))
    return figure


def alpha_over_time_figure(
    history: Sequence[tuple[int, Sequence[float]]],
    *,
    validation: Sequence[tuple[int, Sequence[float]]] = (),
    title: str = "",
) -> Figure:
    """Mean acceptance rate alpha of each depth over training steps: training as lines, validation as points.

    Args:
        history: (step, [alpha_1 .. alpha_K]) in the order of the steps.
        validation: the same on held-out text.
        title: over the figure.

    Raises:
        ValueError: an empty history.
    """
    if not history:
        raise ValueError("alpha over time: expected at least one (step, alphas) entry, got none")
    num_depths = len(history[0][1])
    # Depth is ordered, so its colours are too: dark to light along a map that is monotonous in lightness.
    colours = matplotlib.colormaps["viridis"](np.linspace(0.0, 0.85, num_depths))
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(WIDTH_INCHES, 4.2), dpi=DPI, layout="constrained")
        axes = figure.add_subplot()
        for depth, colour in enumerate(colours):
            axes.plot(
                *_depth_series(history, depth), color=colour, linewidth=1.3, marker="" if len(history) > 1 else "_"
            )
            points = axes.plot(*_depth_series(validation, depth), color=colour, linestyle="", marker="o", zorder=3)
            points[0].set(markeredgecolor="white", clip_on=False)
        axes.set_xlabel("training step")
        axes.set_ylabel("mean acceptance rate α (0 to 1)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_ylim(bottom=0)
        handles = [Line2D([], [], color=colour, label=f"depth {k}") for k, colour in enumerate(colours, start=1)]
        if validation:
            handles.append(Line2D([], [], color=GREY, linestyle="", marker="o", label="validation"))
        _legend(figure, handles)
        figure.suptitle(title)
    return figure


def _depth_series(history: Sequence[tuple[int, Sequence[float]]], depth: int) -> tuple[list[int], list[float]]:
    return [step for step, _ in history], [alphas[depth] for _, alphas in history]


def _draw_measured(axes: Axes, points: list[ResultRow], index: int, shift: float) -> None:
    x, tau = _xy(points, shift)
    colour = line_colour(index)
    axes.plot(x, tau, color=colour, marker=line_marker(index))
    # Lines, not errorbar(): a bootstrap interval need not hold the point estimate, and nan draws nothing.
    axes.vlines(x, [row.low for row in points], [row.high for row in points], color=colour, linewidth=1.2)
    walk = [float("nan") if row.walk_tau is None else row.walk_tau for row in points]
    axes.plot(x, walk, color=colour, linestyle="", marker="o", markersize=9, fillstyle="none", markeredgewidth=1.1)


@contextmanager
def _panels(rows: Sequence[ResultRow], title: str | None) -> Iterator[tuple[Figure, dict[float, Axes]]]:
    """An empty figure with one panel a temperature, sharing the vertical axis."""
    temperatures = sorted({row.temperature for row in rows})
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(WIDTH_INCHES, 4.2), dpi=DPI, layout="constrained")
        grid = figure.subplots(1, len(temperatures), sharey=True, squeeze=False)[0]
        for axes, temperature in zip(grid, temperatures, strict=True):
            axes.set_title(f"T = {temperature:g}")
        figure.suptitle(f"{rows[0].draft}, {rows[0].loss}, {rows[0].target}" if title is None else title)
        yield figure, dict(zip(temperatures, grid, strict=True))


def _check_rows(rows: Sequence[ResultRow]) -> None:
    if not rows:
        raise ValueError("figure: expected at least one results row, got none")
    seen: dict[tuple[str, float, int], ResultRow] = {}
    for row in rows:
        point = (row.benchmark, row.temperature, row.num_draft_tokens)
        if other := seen.get(point):
            raise ValueError(
                f"figure: two rows for {row.benchmark} at T={row.temperature:g}, K={row.num_draft_tokens} "
                f"(run {other.run}, {other.engine} and run {row.run}, {row.engine}); give rows of one run, engine "
                f"and protocol"
            )
        seen[point] = row


def _benchmarks(rows: Sequence[ResultRow]) -> list[str]:
    return list(dict.fromkeys(row.benchmark for row in rows))


def _points(rows: Sequence[ResultRow], benchmark: str, temperature: float) -> list[ResultRow]:
    chosen = (row for row in rows if row.benchmark == benchmark and row.temperature == temperature)
    return sorted(chosen, key=lambda row: row.num_draft_tokens)


def _xy(points: Sequence[ResultRow], shift: float) -> tuple[list[float], list[float]]:
    return [row.num_draft_tokens + shift for row in points], [row.tau for row in points]


def _benchmark_handles(benchmarks: Sequence[str]) -> list[Line2D]:
    return [
        Line2D([], [], color=line_colour(index), marker=line_marker(index), label=name)
        for index, name in enumerate(benchmarks)
    ]


def _ring(label: str) -> Line2D:
    return Line2D([], [], color=GREY, linestyle="", marker="o", markersize=9, fillstyle="none", label=label)


def _legend(figure: Figure, handles: Sequence[Line2D]) -> None:
    figure.legend(handles=handles, loc="outside right upper")
