"""The table that renderers write: rows and columns of cells, a caption, and commands for what is missing."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pandas as pd

from lkspec.reporting.intervals import Estimate

OURS, PAPER = "ours", "paper"


@dataclass(frozen=True)
class Cell:
    """One number of a table, or the absence of one.

    Attributes:
        estimate: mean over seeds with its interval; None: missing.
        gain: over the baseline, paired; None for the baseline itself and where there is none.
        runs: names of the runs behind it.
        missing: numbers of the commands that fill it, counted from 1.
    """

    estimate: Estimate | None
    gain: Estimate | None = None
    runs: tuple[str, ...] = ()
    missing: tuple[int, ...] = ()

    @property
    def is_resolved(self) -> bool:
        """Whether the gain's interval excludes 0."""
        return self.gain is not None and self.gain.excludes_zero


@dataclass(frozen=True)
class TableRow:
    """Labels of a row, one for each row key; ``source`` is ``ours`` or ``paper``."""

    labels: tuple[str, ...]
    source: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Table:
    """What a renderer gets.

    Attributes:
        row_keys, column_keys: what the labels of rows and columns are values of.
        columns: labels of each column, one for each column key.
        digits: behind the point.
        caption: sentences about everything in the table.
        commands: what fills the missing cells.
    """

    title: str
    row_keys: tuple[str, ...]
    column_keys: tuple[str, ...]
    columns: tuple[tuple[str, ...], ...]
    rows: tuple[TableRow, ...]
    digits: int
    caption: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()

    def digits_of(self, row: TableRow) -> int:
        """Behind the point; the paper gives two."""
        return min(self.digits, 2) if row.source == PAPER else self.digits

    @property
    def row_header(self) -> list[str]:
        """The names above ``row_labels``."""
        return [*self.row_keys, *(["source"] if self._has_paper else [])]

    def row_labels(self, row: TableRow) -> list[str]:
        """Labels of a row, and where its numbers come from when the table also shows the paper's."""
        return [*row.labels, *([row.source] if self._has_paper else [])]

    @property
    def _has_paper(self) -> bool:
        return any(row.source == PAPER for row in self.rows)

    def column_names(self, column: tuple[str, ...]) -> list[str]:
        """The labels of a column, or its first; bare numbers say what they are."""
        forms = {"temperature": "T = {}", "num_draft_tokens": "K = {}", "depth": "depth {}"}
        return [forms.get(key, "{}").format(text) for key, text in zip(self.column_keys, column, strict=False)]

    def head(self) -> list[list[tuple[str, int]]]:
        """A line for each column key: names, and how many columns each stands over (in the last line one)."""
        levels = range(1, len(self.column_keys) + 1)
        lines = (itertools.groupby(column[:level] for column in self.columns) for level in levels)
        return [[(self.column_names(labels)[-1], len(list(group))) for labels, group in line] for line in lines]

    def frame(self) -> pd.DataFrame:
        """A row for each cell, with every number of it."""
        lines = []
        for row in self.rows:
            for column, cell in zip(self.columns, row.cells, strict=True):
                place = dict(zip((*self.row_keys, *self.column_keys), (*row.labels, *column), strict=True))
                numbers = {
                    **{name: getattr(cell.estimate, name, None) for name in ("value", "low", "high")},
                    "gain": getattr(cell.gain, "value", None),
                    "gain_low": getattr(cell.gain, "low", None),
                    "gain_high": getattr(cell.gain, "high", None),
                    "resolved": cell.is_resolved,
                    "num_seeds": getattr(cell.estimate, "num_seeds", None),
                    "num_prompts": getattr(cell.estimate, "num_groups", None),
                    "runs": " ".join(cell.runs),
                    "missing": " && ".join(self.commands[number - 1] for number in cell.missing),
                }
                lines.append({**place, "source": row.source, **numbers})
        return pd.DataFrame(lines)
