"""What a table shows: which settings are its rows and columns, their order, and which of the runs' series it takes."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lkspec.reporting.labels import label, sort_key
from lkspec.reporting.paper import PaperTable
from lkspec.reporting.series import Series

Labels = tuple[str, ...]
MEAN = "mean"  # the label of a column that averages over the others


@dataclass(frozen=True)
class Layout:
    """The options of ``lkspec report``; ``conf/report.yaml`` documents each.

    Raises:
        ValueError: a key in both rows and columns, none of one of them, or values out of range.
    """

    rows: Sequence[str] = ("draft", "loss")
    columns: Sequence[str] = ("temperature", "benchmark")
    value: str | Sequence[str] = "tau"
    baseline: str | Mapping[str, Any] | None = None
    mean: str | None = None
    where: Mapping[str, Any] = field(default_factory=dict)
    order: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    expect: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    paper: str | None = None
    confidence: float = 0.95
    digits: int = 3
    title: str | None = None

    def __post_init__(self) -> None:
        twice = set(self.rows) & set(self.columns)
        if twice or not self.rows or not self.columns:
            raise ValueError(
                f"rows={list(self.rows)}, columns={list(self.columns)}: expected at least one key each and none in both"
            )
        if self.mean is not None and self.mean not in self.columns:
            raise ValueError(f"mean={self.mean}: expected one of the columns {list(self.columns)}, or null")
        for name, keys in (("baseline", self.baseline_keys), ("expect", self.expect)):
            if unknown := set(keys) - set(self.rows):
                raise ValueError(f"{name}: expected keys of rows {list(self.rows)}, got {', '.join(sorted(unknown))}")
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence: expected a share between 0 and 1, got {self.confidence}")

    @property
    def values(self) -> list[str]:
        """The measures shown."""
        return [self.value] if isinstance(self.value, str) else list(self.value)

    @property
    def column_keys(self) -> tuple[str, ...]:
        """What column labels are values of; the measure comes last where there are several."""
        return (*self.columns, *(["value"] if len(self.values) > 1 else []))

    @property
    def baseline_keys(self) -> dict[str, str]:
        """The labels that make a row the baseline of others: a plain value is one of the last row key."""
        if self.baseline is None:
            return {}
        if not isinstance(self.baseline, Mapping):
            return {self.rows[-1]: label(self.baseline)}
        return {key: label(value) for key, value in self.baseline.items()}

    def baseline_of(self, labels: Sequence[str]) -> tuple[str, ...]:
        """The row that a row is compared with (itself for a baseline)."""
        return _replaced(self.rows, labels, self.baseline_keys)

    def split(self, column: Sequence[str]) -> tuple[dict[str, str], str, str | None]:
        """A column's settings, its measure, and the key that it averages over, if any.

        The averaged key is not among the settings.
        """
        value = column[-1] if len(self.values) > 1 else self.values[0]
        place = dict(zip(self.columns, column, strict=False))
        averaged = self.mean if self.mean is not None and place[self.mean] == MEAN else None
        return {key: text for key, text in place.items() if key != averaged}, value, averaged


def chosen(series: Sequence[Series], layout: Layout, measure: str) -> list[Series]:
    """The series that ``where`` wants; ``max`` is the largest value of each run (of num_draft_tokens, of steps).

    Where nothing asks for it, sharpness is 1, as trained, and K of the walk, known up to a run's depths, the largest.

    Raises:
        ValueError: a key that nobody knows, or nothing left.
    """
    _check_keys(series, layout)
    left = list(series)
    usual = {"sharpness": 1.0, **({"num_draft_tokens": "max"} if measure == "walk" else {})}
    asked = (*layout.rows, *layout.columns, *layout.where)
    unasked = {key: wanted for key, wanted in usual.items() if key not in asked}
    for key, wanted in {**unasked, **layout.where}.items():
        if wanted == "max":
            largest = {one.run.name: max(o.get(key) for o in left if o.run.name == one.run.name) for one in left}
            left = [one for one in left if one.get(key) == largest[one.run.name]]
            continue
        labels = {label(value) for value in ([wanted] if isinstance(wanted, str | int | float) else wanted or [None])}
        left = [one for one in left if label(one.get(key)) in labels]
        if series and not left:
            there = sorted({label(one.get(key)) for one in series}, key=sort_key)
            raise ValueError(f"where.{key}={label(wanted)} leaves nothing; the runs have {', '.join(there)}")
    return left


def _check_keys(series: Sequence[Series], layout: Layout) -> None:
    if not series:
        return
    known = sorted({key for one in series for key in (*one.settings, *one.config, *one.settings["protocol"])})
    for key in (*layout.rows, *layout.columns, *layout.where):
        if key not in known:
            near = difflib.get_close_matches(key, known, n=3)
            raise ValueError(
                f"{key!r} is neither a setting ({', '.join(series[0].settings)}) nor a key of the runs' configuration"
                + (f"; did you mean {' or '.join(near)}?" if near else "")
            )


def table_columns(layout: Layout, series: Sequence[Series], paper: PaperTable) -> list[Labels]:
    """Labels of every column: what the runs have, what the paper has, means, and each measure."""
    found = {tuple(label(one.get(key)) for key in layout.columns) for one in series}
    ordered = _ordered(layout, layout.columns, found | set(paper.labels(layout.columns)))
    if layout.mean is not None:
        ordered = _with_means(ordered, list(layout.columns).index(layout.mean))
    if len(layout.values) == 1:
        return ordered
    return [(*column, value) for column in ordered for value in layout.values]


def _with_means(columns: Sequence[Labels], place: int) -> list[Labels]:
    """Behind the columns that differ only in one key, one for their mean."""
    by_rest: dict[Labels, list[Labels]] = {}
    for column in columns:
        by_rest.setdefault((*column[:place], *column[place + 1 :]), []).append(column)
    result: list[Labels] = []
    for rest, group in by_rest.items():
        result += [*group, (*rest[:place], MEAN, *rest[place:])] if len(group) > 1 else group
    return result


def table_rows(layout: Layout, series: Sequence[Series], paper: PaperTable) -> tuple[list[Labels], set[Labels]]:
    """Labels of every row, and which of them we should have numbers for; the others, the paper's alone, come last.

    Ours are the rows that are there, their baselines, what ``expect`` names, and what the paper's authors trained.

    Raises:
        ValueError: a plain baseline, which is one of the last row key's, that only rows by another key have.
    """
    keys = list(layout.rows)
    there = {tuple(label(one.get(key)) for key in keys) for one in series}
    _check_baseline(layout, there)
    ours = set(there)
    for key, values in layout.expect.items():
        ours |= {_replaced(keys, labels, {key: label(value)}) for labels in ours for value in values}
    ours |= {_replaced(keys, labels, recipe) for labels in there for recipe in paper.recipes(keys)}
    ours |= {layout.baseline_of(labels) for labels in ours}
    ordered = _ordered(layout, keys, ours | set(paper.labels(keys)))
    return sorted(ordered, key=lambda labels: labels not in ours), ours


def _check_baseline(layout: Layout, there: Collection[Labels]) -> None:
    if layout.baseline is None or isinstance(layout.baseline, Mapping):
        return
    name = label(layout.baseline)
    *others, last = ({labels[place] for labels in there} for place in range(len(layout.rows)))
    if name in last:
        return
    for key, names in zip(layout.rows, others, strict=False):
        if name in names:
            raise ValueError(
                f"baseline={name}: a plain value is one of the last row key, and no row has {layout.rows[-1]} {name}; "
                f"say 'baseline={{{key}:{name}}}'"
            )


def _replaced(keys: Sequence[str], labels: Sequence[str], changes: Mapping[str, str]) -> Labels:
    return tuple(changes.get(key, text) for key, text in zip(keys, labels, strict=True))


def _ordered(layout: Layout, keys: Sequence[str], found: Iterable[Labels]) -> list[Labels]:
    """In the order that was asked for, then the baseline, then by name, numbers as numbers."""

    def place(key: str, text: str) -> tuple[object, ...]:
        asked = [label(value) for value in layout.order.get(key, ())]
        first = asked.index(text) if text in asked else len(asked)
        return first, text != layout.baseline_keys.get(key), sort_key(text)

    return sorted(set(found), key=lambda labels: [place(key, text) for key, text in zip(keys, labels, strict=True)])
