"""The acceptance lengths and speed-ups that Samarin et al. report, to stand beside ours.

Facts copied from the tables of "LK Losses: Direct Acceptance Rate Optimization for Speculative Decoding",
arXiv 2602.23881 (v2, June 2026): Tables 1, 2 and 4; Figure 1 was read off the picture, to about 0.01. The rows of other
origin say so in the column ``source``. Benchmarks are whole; the paper gives neither seeds nor intervals.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lkspec.reporting.labels import label

CITATION = "Samarin et al. 2026, arXiv 2602.23881"
PUBLIC = "public checkpoint"  # the origin of drafts that the authors measured but did not train
KEYS = ("target", "draft", "objective", "benchmark", "temperature", "num_draft_tokens")
_FILE = Path(__file__).with_name("paper_results.csv")
_MEASURES = {"tau": "acceptance_length", "speedup": "speedup"}


@dataclass(frozen=True)
class PaperNumber:
    """One number: its settings as labels, who made the draft, and the measure (``tau`` or ``speedup``)."""

    settings: Mapping[str, str]
    origin: str
    measure: str
    value: float


@dataclass(frozen=True)
class PaperTable:
    """The numbers of one table, those of no table when the name is None."""

    numbers: tuple[PaperNumber, ...] = ()

    @classmethod
    def read(cls, name: str | None, keys: Sequence[str]) -> PaperTable:
        """Table "1", "2", "4" or "figure 1".

        Raises:
            ValueError: no such table, or a key that its numbers have not.
        """
        if name is None:
            return cls()
        if unknown := [key for key in keys if key not in KEYS]:
            raise ValueError(
                f"paper={name}: its numbers have no {', '.join(unknown)}; take rows and columns from {', '.join(KEYS)}"
            )
        with _FILE.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        chosen = [row for row in rows if str(name) in row["table"].split(",")]
        if not chosen:
            names = sorted({part for row in rows for part in row["table"].split(",")})
            raise ValueError(f"paper: expected one of {', '.join(map(repr, names))}, got {name!r}")
        return cls(
            tuple(
                PaperNumber({key: row[key] for key in KEYS}, row["source"], measure, float(row[column]))
                for row in chosen
                for measure, column in _MEASURES.items()
                if row[column]
            )
        )

    def labels(self, keys: Sequence[str]) -> list[tuple[str, ...]]:
        """The different labels of some keys."""
        return list(dict.fromkeys(tuple(number.settings[key] for key in keys) for number in self.numbers))

    def recipes(self, keys: Sequence[str]) -> list[dict[str, str]]:
        """What the authors trained, as far as ``keys`` tell it apart; the target is not part of it."""
        wanted = [key for key in keys if key in ("draft", "objective")]
        own = [number for number in self.numbers if number.origin != PUBLIC]
        return [dict(t) for t in dict.fromkeys(tuple((key, n.settings[key]) for key in wanted) for n in own)]

    def value(self, settings: Mapping[str, str], measure: str) -> float | None:
        """The number at some settings, the mean where they leave several benchmarks."""
        found = [
            number.value
            for number in self.numbers
            if number.measure == measure and all(number.settings[key] == text for key, text in settings.items())
        ]
        return sum(found) / len(found) if found else None

    def depths(self) -> str:
        """K of its drafts, in words."""
        by_draft = dict.fromkeys((n.settings["draft"], label(n.settings["num_draft_tokens"])) for n in self.numbers)
        return ", ".join(f"{draft} {depth}" for draft, depth in by_draft)
