"""Fills a table: each cell the mean over seeds and the gain over the baseline, paired by seed and prompt."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lkspec.reporting.captions import caption
from lkspec.reporting.cells import aligned, check_cell, common_seeds, protocols_differ, recipes_differ
from lkspec.reporting.commands import Commands
from lkspec.reporting.counts import read_series
from lkspec.reporting.intervals import Estimate, estimate, paired_gain
from lkspec.reporting.labels import label
from lkspec.reporting.layout import Labels, Layout, chosen, table_columns, table_rows
from lkspec.reporting.model import OURS, PAPER, Cell, Table, TableRow
from lkspec.reporting.paper import PaperTable
from lkspec.reporting.series import Series
from lkspec.runs.folder import RunFolder


def build_table(runs: Sequence[RunFolder], layout: Layout) -> Table:
    """Reads runs and lays them out.

    Raises:
        ValueError: as ``read_series``, ``chosen``, ``check_cell`` and ``PaperTable.read``; a baseline measured under
            another protocol than what is compared with it.
    """
    series = {value: chosen(read_series(runs, value), layout, value) for value in layout.values}
    everything = [one for group in series.values() for one in group]
    if not everything:
        raise ValueError(
            f"value={', '.join(layout.values)}: none of the {len(runs)} runs holds it; walk and alpha are measured by "
            "the validation of a finished training, everything else by `lkspec evaluate run=...`"
        )
    paper = PaperTable.read(layout.paper, [*layout.rows, *layout.columns])
    columns = table_columns(layout, everything, paper)
    all_labels, wanted = table_rows(layout, everything, paper)
    filler = _Filler(layout, series, paper, Commands(everything))
    rows = []
    for labels in all_labels:
        if labels in wanted:
            rows.append(TableRow(labels, OURS, tuple(filler.cell(labels, column) for column in columns)))
        numbers = tuple(filler.paper_cell(labels, column) for column in columns)
        if any(cell.estimate is not None for cell in numbers):
            rows.append(TableRow(labels, PAPER, numbers))
    table = Table(
        title=layout.title or f"{', '.join(layout.values)} by {', '.join(layout.rows)}",
        row_keys=tuple(layout.rows),
        column_keys=layout.column_keys,
        columns=tuple(columns),
        rows=tuple(rows),
        digits=layout.digits,
        commands=filler.commands.texts,
    )
    return replace(table, caption=caption(table, layout, filler.shown, filler.apart, paper))


class _Filler:
    """Makes cells and remembers what went into them."""

    def __init__(
        self, layout: Layout, series: Mapping[str, Sequence[Series]], paper: PaperTable, commands: Commands
    ) -> None:
        self.layout, self.paper, self.commands = layout, paper, commands
        self.shown: list[Series] = []
        self.apart: dict[str, None] = {}  # how rows differ from their baselines, each sentence once
        self._series = {value: _by_labels(group) for value, group in series.items()}
        self._by_place: dict[tuple[str, tuple[str, ...]], dict[Labels, list[Series]]] = {}

    def cell(self, labels: Labels, column: Labels) -> Cell:
        """Our number; where there is none, the commands that would make it."""
        place, value, averaged = self.layout.split(column)
        wanted = {**dict(zip(self.layout.rows, labels, strict=True)), **place}
        members = self._members(wanted, value, averaged)
        if not members:
            return Cell(None, missing=() if averaged else self.commands.add(wanted, value))
        name = f"cell ({', '.join((*labels, *column))})"
        check_cell(members, name, averaged=averaged)
        self.shown += members
        found = estimate(
            aligned([members], averaged=averaged)[0], offset=members[0].offset, confidence=self.layout.confidence
        )
        cell = Cell(found, None, tuple(dict.fromkeys(one.run.name for one in members)))
        base = self.layout.baseline_of(labels)
        if base == labels:
            return cell
        others = self._members({**wanted, **dict(zip(self.layout.rows, base, strict=True))}, value, averaged)
        if not others or not common_seeds([members, others]):
            return cell
        check_cell(others, f"the baseline of {name}", averaged=averaged)
        if told := protocols_differ(members, others):
            raise ValueError(
                f"{name}: measured under another protocol than its baseline {', '.join(base)}: {told}; measure one of "
                "them again with `lkspec evaluate`, narrow runs=, or leave baseline out"
            )
        if told := recipes_differ(members[0], others[0]):
            self.apart[f"{', '.join(labels)} differs from {', '.join(base)} also in {told}."] = None
        pair = aligned([members, others], averaged=averaged)
        return replace(cell, gain=paired_gain(*pair, confidence=self.layout.confidence))

    def paper_cell(self, labels: Labels, column: Labels) -> Cell:
        """The paper's number, and how far it lies above the paper's baseline."""
        place, value, _ = self.layout.split(column)
        number = self.paper.value({**dict(zip(self.layout.rows, labels, strict=True)), **place}, value)
        base = self.layout.baseline_of(labels)
        if number is None:
            return Cell(None)
        other = self.paper.value({**dict(zip(self.layout.rows, base, strict=True)), **place}, value)
        return Cell(_exact(number), None if other is None or base == labels else _exact(number - other))

    def _members(self, wanted: Mapping[str, str], value: str, averaged: str | None) -> list[Series]:
        """The series at some settings; with ``averaged``, those of the seeds that have every value of that key."""
        found = self._at(value, wanted)
        if averaged is None:
            return found
        place = {key: text for key, text in wanted.items() if key in self.layout.columns}
        needed = {label(one.get(averaged)) for one in self._at(value, place)}
        seeds = [{one.get("seed") for one in found if label(one.get(averaged)) == text} for text in needed]
        complete: set[Any] = set.intersection(*seeds) if seeds else set()
        return [one for one in found if one.get("seed") in complete]

    def _at(self, value: str, wanted: Mapping[str, str]) -> list[Series]:
        keys = tuple(wanted)
        if (value, keys) not in self._by_place:
            index: dict[Labels, list[Series]] = {}
            for one in self._series[value]:
                index.setdefault(tuple(label(one.get(key)) for key in keys), []).append(one)
            self._by_place[value, keys] = index
        return self._by_place[value, keys].get(tuple(wanted.values()), [])


def _by_labels(series: Sequence[Series]) -> list[Series]:
    return sorted(series, key=lambda one: (label(one.get("seed")), one.run.name))


def _exact(value: float) -> Estimate:
    """A number that was given without an interval."""
    return Estimate(value, math.nan, math.nan, 1, 0)
