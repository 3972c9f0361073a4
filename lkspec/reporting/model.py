"""The table that renderers write: rows and columns of cells, a caption, and commands for what is missing."""

from __future__ import annotations

from dataclasses import dataclass, field

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
class Row:
    """Labels of a row, one a row key; ``source`` is ``ours`` or ``paper``."""

    labels: tuple[str, ...]
    source: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Table:
    """What a renderer gets.

    Attributes:
        row_keys, column_keys: what the labels of rows and columns are values of.
        columns: labels of each column, one a column key.
        digits: behind the point.
        caption: sentences about everything in the table.
        commands: what fills the missing cells.
    """

    title: str
    row_keys: tuple[str, ...]
    column_keys: tuple[str, ...]
    columns: tuple[tuple[str, ...], ...]
    rows: tuple[Row, ...]
    digits: int
    caption: tuple[str, ...] = ()
    commands: tuple[str, ...] = field(default=())

    def digits_of(self, row: Row) -> int:
        """Behind the point; the paper gives two."""
        return min(self.digits, 2) if row.source == PAPER else self.digits

    @property
    def has_paper(self) -> bool:
        """Whether any row is the paper's."""
        return any(row.source == PAPER for row in self.rows)

    def frame(self) -> pd.DataFrame:
        """A row a cell, every number of it."""
        lines = []
        for row in self.rows:
            for column, cell in zip(self.columns, row.cells, strict=True):
                place = dict(zip((*self.row_keys, *self.column_keys), (*row.labels, *column), strict=True))
                lines.append({**place, "source": row.source, **_numbers(cell, self.commands)})
        return pd.DataFrame(lines)

    def pivot(self) -> pd.DataFrame:
        """The estimates alone, in the table's own layout."""
        index = pd.MultiIndex.from_tuples([(*row.labels, row.source) for row in self.rows], names=[*self.row_keys, ""])
        columns = pd.MultiIndex.from_tuples(list(self.columns), names=list(self.column_keys))
        values = [[None if cell.estimate is None else cell.estimate.value for cell in row.cells] for row in self.rows]
        return pd.DataFrame(values, index=index, columns=columns, dtype=float)


def _numbers(cell: Cell, commands: tuple[str, ...]) -> dict[str, object]:
    estimate, gain = cell.estimate, cell.gain
    return {
        "value": None if estimate is None else estimate.value,
        "low": None if estimate is None else estimate.low,
        "high": None if estimate is None else estimate.high,
        "gain": None if gain is None else gain.value,
        "gain_low": None if gain is None else gain.low,
        "gain_high": None if gain is None else gain.high,
        "resolved": cell.is_resolved,
        "num_seeds": None if estimate is None else estimate.num_seeds,
        "num_prompts": None if estimate is None else estimate.num_groups,
        "runs": " ".join(cell.runs),
        "missing": " && ".join(commands[number - 1] for number in cell.missing),
    }
