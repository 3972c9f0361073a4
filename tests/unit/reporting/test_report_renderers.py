"""Formats: every number of a table arrives, special characters are escaped, and a page stands alone."""

from __future__ import annotations

import csv
import io
import math
import re
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest

from lkspec.reporting.figures import gains_figure, lines_figure
from lkspec.reporting.intervals import Estimate
from lkspec.reporting.model import Cell, Table, TableRow
from lkspec.reporting.renderers import RENDERERS


def estimate(value: float, half: float = math.nan) -> Estimate:
    return Estimate(value, value - half, value + half, 3, 40)


@pytest.fixture
def table() -> Table:
    better = Cell(estimate(1.4, 0.02), estimate(0.1, 0.05), ("a", "b"))
    same = Cell(estimate(1.3, 0.02), estimate(0.01, 0.05), ("a",))
    gap = Cell(None, missing=(1,))
    return Table(
        title="tau & <co>",
        row_keys=("draft", "loss"),
        column_keys=("temperature", "num_draft_tokens"),
        columns=(("0", "1"), ("0", "2"), ("1", "2")),
        rows=(
            TableRow(("mlp", "kl"), "ours", (Cell(estimate(1.3, 0.02)), Cell(estimate(1.29, 0.02)), gap)),
            TableRow(("mlp", "lk_lambda"), "ours", (better, same, Cell(estimate(1.2)))),
            TableRow(("mlp", "lk_lambda"), "paper", (Cell(None), Cell(estimate(3.39), estimate(0.21)), Cell(None))),
        ),
        digits=3,
        caption=("K = 1, 2; 95% | ±.",),
        commands=("lkspec train 'a=<b>'",),
    )


def test_markdown(table):
    lines = RENDERERS["markdown"](table).splitlines()
    rows = [line for line in lines if line.startswith("| mlp")]
    assert len({line.count(" | ") for line in [*rows, lines[2]]}) == 1
    assert "T = 0<br>K = 1" in lines[2]
    assert rows[1] == (
        "| mlp | lk_lambda | ours | 1.400 ±0.020<br>**+0.100 ±0.050** | 1.300 ±0.020<br>+0.010 ±0.050 | 1.200 |"
    )
    assert rows[0].endswith("| missing [1] |")
    assert rows[2] == "| mlp | lk_lambda | paper | - | 3.39<br>+0.21 | - |"
    assert "lkspec train 'a=<b>'  # [1]" in lines


def test_csv_holds_every_number_unrounded(table):
    rows = list(csv.DictReader(io.StringIO(RENDERERS["csv"](table))))
    assert len(rows) == 9
    best = next(row for row in rows if row["gain"] and float(row["gain"]) == 0.1)
    assert (best["draft"], best["loss"], best["temperature"], best["num_draft_tokens"]) == (
        "mlp",
        "lk_lambda",
        "0",
        "1",
    )
    assert (float(best["low"]), float(best["gain_high"]), best["resolved"]) == (1.4 - 0.02, 0.1 + 0.05, "True")
    assert (best["num_seeds"], best["num_prompts"], best["runs"]) == ("3.0", "40.0", "a b")
    assert [row["missing"] for row in rows if row["missing"]] == ["lkspec train 'a=<b>'"]


def test_latex(table):
    text = RENDERERS["latex"](table)
    assert r"lk\_lambda & ours & 1.400 $\pm$0.020 (\textbf{+0.100 $\pm$0.050}) & 1.300 $\pm$0.020 (+0.010" in text
    assert r" &  &  & \multicolumn{2}{c}{T = 0} & \multicolumn{1}{c}{T = 1} \\" in text
    assert r"\caption{tau \& <co>. K = 1, 2; 95\% | $\pm$.}" in text
    assert text.count(r"\begin{") == text.count(r"\end{") == 2
    widths = {line.count(" & ") for line in text.splitlines() if line.endswith(r"\\") and "multicolumn" not in line}
    assert widths == {5}
    assert "% missing [1]: lkspec train 'a=<b>'" in text


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loaded: list[str] = []
        self.cells: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.loaded += [value for key, value in attrs if key in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "td" in self.open:
            self.cells[-1] += data


def test_a_page_stands_alone(table):
    text = RENDERERS["html"](table)
    page = Page(text)
    assert page.open == []
    assert [re.sub(r",.*", "", source) for source in page.loaded] == ["data:image/png;base64"]
    assert "&amp; &lt;co&gt;" in text
    assert "a=&lt;b&gt;" in text
    assert page.cells == [
        "1.300 ±0.020", "1.290 ±0.020", "missing [1]",
        "1.400 ±0.020+0.100 ±0.050", "1.300 ±0.020+0.010 ±0.050", "1.200 ",
        "", "3.39 +0.21", "",
    ]  # fmt: skip
    assert text.count('class="gain resolved"') == 1


def test_lines_run_over_the_last_column_key(table):
    figure = lines_figure(table)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["T = 0", "T = 1"]
    points = [line.get_xydata() for line in figure.axes[0].lines]
    drawn = [[(round(x), y) for x, y in line] for line in points]
    assert drawn == [[(1, 1.3), (2, 1.29)], [(1, 1.4), (2, 1.3)], [(2, 3.39)]]
    asides = [line[0, 0] - round(line[0, 0]) for line in points]
    assert asides == sorted(set(asides))
    assert max(map(abs, asides)) < 0.1
    assert [line.get_linestyle() for line in figure.axes[0].lines] == ["-", "-", "--"]
    words = Table(
        "t", ("loss",), ("benchmark",), (("gsm8k",),), (TableRow(("kl",), "ours", (Cell(estimate(1.0)),)),), 3
    )
    with pytest.raises(ValueError, match=r"must be numbers .* benchmark has gsm8k"):
        lines_figure(words)


def test_lines_over_close_numbers_stand_aside_by_less_and_labels_do_not_touch():
    columns = tuple((draft, s) for draft in "abcd" for s in ("1", "1.125", "1.25", "1.5"))
    rows = tuple(TableRow((loss,), "ours", (Cell(estimate(1.0)),) * 16) for loss in ("kl", "tv"))
    figure = lines_figure(Table("t", ("loss",), ("draft", "sharpness"), columns, rows, 3))
    first, second = (line.get_xdata() for line in figure.axes[0].lines)
    assert np.allclose((first + second) / 2, [1, 1.125, 1.25, 1.5])
    assert 0 < second[0] - first[0] < 0.125 / 10
    figure.canvas.draw()
    for axes in figure.axes:
        boxes = [label.get_window_extent() for label in axes.get_xticklabels() if label.get_text()]
        assert 2 <= len(boxes) < 4
        assert all(left.x1 < right.x0 for left, right in pairwise(boxes))


def test_gains_are_drawn_with_their_intervals(table):
    (axes,) = gains_figure(table).axes
    assert axes.get_title(loc="left") == "mlp, lk_lambda"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["T = 0, K = 1", "T = 0, K = 2", "T = 1, K = 2"]
    spans = [segment[:, 0].tolist() for bars in axes.collections for segment in bars.get_segments()]
    assert spans == [pytest.approx([0.05, 0.15]), pytest.approx([-0.04, 0.06])]
    assert (
        gains_figure(Table("t", ("a",), ("b",), (("1",),), (TableRow(("x",), "ours", (Cell(estimate(1)),)),), 3))
        is None
    )
