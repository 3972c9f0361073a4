"""Figures: what is drawn and written in them, on the Figure object, and that the PNG holds it."""

from __future__ import annotations

import math
import struct
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from lkspec import files
from lkspec.reporting.figure_style import save
from lkspec.reporting.measured import print_results
from lkspec.reporting.run_figures import (
    acceptance_per_position_figure,
    alpha_over_time_figure,
    tau_over_k_figure,
)
from lkspec.runs.rows import ResultRow


def row(benchmark: str, temperature: float, num_draft_tokens: int, rate: float, **changes) -> ResultRow:
    alpha = tuple(rate**k for k in range(1, num_draft_tokens + 1))
    tau = 1 + sum(alpha)
    made = ResultRow(
        run="r",
        commit="none",
        code_hash="c",
        draft="eagle3",
        loss="lk_lambda",
        loss_args="{}",
        target="tiny",
        data_fingerprint="f",
        seed=0,
        supervised_tokens=1,
        steps=1,
        benchmark=benchmark,
        temperature=temperature,
        num_draft_tokens=num_draft_tokens,
        engine="lkspec",
        sharpness=1.0,
        tau=tau,
        low=tau - 0.1,
        high=tau + 0.2,
        alpha=alpha,
        tau_whole_rounds=None,
        walk_tau=tau + 0.01,
        walk_over_k="[]",
        tokens_per_second=None,
        speedup=None,
        num_prompts=3,
        eta=3.0,
        eta_source="paper",
        protocol="{}",
    )
    return replace(made, **changes)


ROWS = [row(b, t, k, r) for t in (1.0, 0.0) for b, r in {"mt_bench": 0.5, "gsm8k": 0.7}.items() for k in (3, 1, 7)]


def legend_labels(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def series(axes, colour: str, *, fillstyle: str = "full") -> tuple[list[float], list[float]]:
    """(x, y) of the one drawn line of this colour and fill."""
    (line,) = [
        line
        for line in axes.lines
        if line.get_color() == colour and line.get_fillstyle() == fillstyle and len(line.get_xdata())
    ]
    return list(line.get_xdata()), list(line.get_ydata())


def colour_of(figure: Figure, label: str) -> str:
    return {handle.get_label(): handle.get_color() for handle in figure.legends[0].legend_handles}[label]


def test_tau_panels_lines_and_labels():
    figure = tau_over_k_figure(ROWS)
    assert [axes.get_title() for axes in figure.axes] == ["T = 0", "T = 1"]
    assert figure.axes[0].get_ylabel() == "acceptance length τ (tokens a round)"
    assert {axes.get_xlabel() for axes in figure.axes} == {"drafted tokens a round, K"}
    assert figure.get_suptitle() == "eagle3, lk_lambda, tiny"
    assert legend_labels(figure) == ["mt_bench", "gsm8k", "interval of τ", "walk estimate"]
    assert colour_of(figure, "mt_bench") != colour_of(figure, "gsm8k")
    x, tau = series(figure.axes[1], colour_of(figure, "gsm8k"))
    assert np.round(x).tolist() == [1, 3, 7]
    assert tau == pytest.approx([1 + sum(0.7**j for j in range(1, k + 1)) for k in (1, 3, 7)])
    assert list(figure.axes[0].get_xticks()) == [1, 3, 7]


def test_tau_intervals_and_walk():
    figure = tau_over_k_figure([row("gsm8k", 1.0, 2, 0.5), row("gsm8k", 1.0, 4, 0.5, walk_tau=None)])
    (axes,) = figure.axes
    (bars,) = [artist for artist in axes.collections if isinstance(artist, LineCollection)]
    taus = [1.75, 1.9375]
    assert [bar[:, 1].tolist() for bar in bars.get_segments()] == [pytest.approx([t - 0.1, t + 0.2]) for t in taus]
    _, walk = series(axes, colour_of(figure, "gsm8k"), fillstyle="none")
    assert walk[0] == pytest.approx(1.76)
    assert math.isnan(walk[1])
    low, high = axes.get_ylim()
    assert low <= 1.0
    assert high > max(taus) + 0.2


def test_tau_before_training_is_grey_and_dashed():
    before = [replace(row("gsm8k", 0.0, k, 0.01), walk_tau=None) for k in (1, 5)]
    figure = tau_over_k_figure(ROWS, before=before)
    assert legend_labels(figure)[-1] == "before training"
    drawn = [line for line in figure.axes[0].lines if line.get_linestyle() == "--" and len(line.get_xdata())]
    assert [list(line.get_xdata()) for line in drawn] == [[1, 5]]
    assert drawn[0].get_color() == colour_of(figure, "before training")
    assert list(figure.axes[0].get_xticks()) == [1, 3, 5, 7]


@pytest.mark.filterwarnings("error")
def test_tau_without_interval_or_walk(tmp_path):
    bare = row("mini", 0.6, 4, 0.5, low=math.nan, high=math.nan, walk_tau=None)
    figure = tau_over_k_figure([bare])
    assert legend_labels(figure) == ["mini"]
    assert [axes.get_title() for axes in figure.axes] == ["T = 0.6"]
    save(tau_over_k_figure([bare, replace(bare, num_draft_tokens=5, tau=math.nan)]), tmp_path / "tau.png")


def test_interval_that_misses_its_estimate_is_drawn(tmp_path):
    save(tau_over_k_figure([row("mini", 1.0, 4, 0.5, low=2.5, high=2.6)]), tmp_path / "tau.png")
    assert (tmp_path / "tau.png").stat().st_size > 0


def test_positions_come_from_the_largest_k():
    figure = acceptance_per_position_figure(ROWS)
    assert legend_labels(figure) == ["mt_bench", "gsm8k"]
    assert figure.axes[0].get_ylabel() == "share of rounds with ≥ k accepted"
    assert figure.axes[0].get_xlabel() == "position k of the drafted token"
    assert figure.axes[0].get_ylim() == (0, 1)
    x, share = series(figure.axes[0], colour_of(figure, "mt_bench"))
    assert x == [1, 2, 3, 4, 5, 6, 7]
    assert share == pytest.approx([0.5**k for k in x])
    assert len(figure.axes[0].lines) == 2


def test_alpha_lines_and_validation_points():
    history = [(s, [0.1 * s, 0.05 * s]) for s in range(1, 6)]
    figure = alpha_over_time_figure(history, [(5, [0.45, 0.2])])
    (axes,) = figure.axes
    assert legend_labels(figure) == ["depth 1", "depth 2", "validation"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("training step", "mean acceptance rate α (0 to 1)")
    assert axes.get_ylim()[0] == 0
    drawn = {(line.get_linestyle(), tuple(line.get_xdata()), tuple(line.get_ydata())) for line in axes.lines}
    assert drawn == {
        ("-", (1, 2, 3, 4, 5), tuple(0.1 * s for s in range(1, 6))),
        ("-", (1, 2, 3, 4, 5), tuple(0.05 * s for s in range(1, 6))),
        ("None", (5,), (0.45,)),
        ("None", (5,), (0.2,)),
    }


def test_depths_have_colours_that_differ_in_lightness():
    figure = alpha_over_time_figure([(0, [0.1] * 7), (1, [0.2] * 7)])
    colours = [handle.get_color() for handle in figure.legends[0].legend_handles]
    lightness = [0.2126 * red + 0.7152 * green + 0.0722 * blue for red, green, blue, _ in colours]
    assert np.diff(lightness).min() > 0.03


def test_alpha_of_one_step_is_visible():
    figure = alpha_over_time_figure([(10, [0.5])])
    assert figure.axes[0].lines[0].get_marker() == "_"
    assert all(float(tick).is_integer() for tick in figure.axes[0].get_xticks())


def everything_is_inside(figure: Figure) -> bool:
    """Whether titles, axis labels and the legend lie within the canvas once laid out."""
    figure.draw_without_rendering()
    canvas = figure.bbox
    boxes = [figure.legends[0].get_window_extent(), *(axes.get_tightbbox() for axes in figure.axes)]
    return all(
        canvas.x0 - 1 <= b.x0 and b.x1 <= canvas.x1 + 1 and canvas.y0 - 1 <= b.y0 and b.y1 <= canvas.y1 + 1
        for b in boxes
    )


def test_nothing_is_cut_off():
    assert everything_is_inside(tau_over_k_figure(ROWS, before=ROWS))
    assert everything_is_inside(acceptance_per_position_figure(ROWS))
    history = [(s, [0.1] * 7) for s in range(3)]
    assert everything_is_inside(alpha_over_time_figure(history, history))


@pytest.mark.parametrize(
    "figure",
    [
        tau_over_k_figure(ROWS),
        acceptance_per_position_figure(ROWS),
        alpha_over_time_figure([(0, [0.1, 0.2]), (1, [0.2, 0.3])]),
    ],
)
def test_png_is_1600_wide_and_replaced_atomically(tmp_path, monkeypatch, figure):
    path = tmp_path / "figures" / "figure.png"
    save(figure, path)
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", content[16:24]) == (1600, 840)
    assert len(content) > 10_000

    def fail(path):
        raise OSError("power cut")

    monkeypatch.setattr(files, "_sync", fail)
    with pytest.raises(OSError, match="power cut"):
        save(figure, path)
    assert path.read_bytes() == content
    assert [file.name for file in path.parent.iterdir()] == ["figure.png"]


def test_a_table_of_measurements_shows_what_was_not_measured_as_a_dash(capsys):
    print_results([row("gsm8k", 1.0, 2, 0.5, walk_tau=math.nan), row("mt_bench", 1.0, 2, 0.5)], title="t")
    first, second = (line for line in capsys.readouterr().out.splitlines() if "│" in line and "T" not in line[:6])
    assert [cell.strip() for cell in first.split("│")[6:8]] == ["-", "-"]
    assert [cell.strip() for cell in second.split("│")[6:8]] == ["-", "1.760"]
    assert "nan" not in first
