"""The rows and columns of a table, and their order."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

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


def _replaced(keys: Sequence[str], labels: Labels, changes: Mapping[str, str]) -> Labels:
    return tuple(changes.get(key, text) for key, text in zip(keys, labels, strict=True))


def _ordered(layout: Layout, keys: Sequence[str], found: Iterable[Labels]) -> list[Labels]:
    """In the order that was asked for, then the baseline, then by name, numbers as numbers."""

    def place(key: str, text: str) -> tuple[object, ...]:
        asked = [label(value) for value in layout.order.get(key, ())]
        first = asked.index(text) if text in asked else len(asked)
        return first, text != layout.baseline_keys.get(key), sort_key(text)

    return sorted(set(found), key=lambda labels: [place(key, text) for key, text in zip(keys, labels, strict=True)])
