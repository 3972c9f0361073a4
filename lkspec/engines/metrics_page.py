"""Counters on a server's metrics page (Prometheus's text format)."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping

_SAMPLE = re.compile(r"(?P<name>[a-zA-Z_:][\w:]*)(?:\{(?P<labels>.*)\})?\s+(?P<value>\S+)(?:\s+-?\d+)?", re.DOTALL)
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


def counter(page: str, name: str) -> float | None:
    """A counter summed over everything that is told apart by labels (the engines of a server); None without it."""
    values = counter_by(page, name, label=None)
    return sum(values.values()) if values else None


def counter_by(page: str, name: str, *, label: str | None) -> Mapping[str, float]:
    """A counter's sum at each value of one label; empty without the counter.

    Clients write the name with ``_total`` behind it or without.
    """
    sums: defaultdict[str, float] = defaultdict(float)
    for line in page.split("\n"):  # not splitlines: labels may hold other line breaks
        match = _SAMPLE.fullmatch(line.strip())
        if match is not None and match["name"] in (name, f"{name}_total"):
            labels = dict(_LABEL.findall(match["labels"] or ""))
            sums[labels[label] if label is not None else ""] += float(match["value"])
    return sums
