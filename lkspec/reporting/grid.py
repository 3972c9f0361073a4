"""The rows and columns of a table, and their order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from lkspec.reporting.labels import label, sort_key
from lkspec.reporting.layout import MEAN, Layout
from lkspec.reporting.paper import PaperTable
from lkspec.reporting.series import Series

Labels = tuple[str, ...]


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
    """
    keys = list(layout.rows)
    there = {tuple(label(one.get(key)) for key in keys) for one in series}
    ours = set(there)
    for key, values in layout.expect.items():
        ours |= {_replaced(keys, labels, {key: label(value)}) for labels in ours for value in values}
    ours |= {_replaced(keys, labels, recipe) for labels in there for recipe in paper.recipes(keys)}
    ours |= {layout.baseline_of(labels) for labels in ours}
    ordered = _ordered(layout, keys, ours | set(paper.labels(keys)))
    return sorted(ordered, key=lambda labels: labels not in ours), ours


def _replaced(keys: Sequence[str], labels: Labels, changes: Mapping[str, str]) -> Labels:
    return tuple(changes.get(key, text) for key, text in zip(keys, labels, strict=True))


def _ordered(layout: Layout, keys: Sequence[str], found: Iterable[Labels]) -> list[Labels]:
    """In the order that was asked for, then the baseline, then by name, numbers as numbers."""

    def place(key: str, text: str) -> tuple[object, ...]:
        asked = [label(value) for value in layout.order.get(key, ())]
        first = asked.index(text) if text in asked else len(asked)
        return first, text != layout.baseline_keys.get(key), sort_key(text)

    return sorted(set(found), key=lambda labels: [place(key, text) for key, text in zip(keys, labels, strict=True)])
