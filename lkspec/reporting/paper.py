"""The acceptance lengths and speed-ups that Samarin et al. report, to stand beside ours.

Facts copied from the tables of "LK Losses: Direct Acceptance Rate Optimization for Speculative Decoding",
arXiv 2602.23881 (v2, June 2026): Tables 1, 2 and 4; Figure 1 was read off the picture, to about 0.01. The rows of other
origin say so in the column ``source``. Benchmarks are whole; the paper gives neither seeds nor intervals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

CITATION = "Samarin et al. 2026, arXiv 2602.23881"
PUBLIC = "public checkpoint"  # the origin of drafts that the authors measured but did not train
KEYS = ("target", "draft", "objective", "benchmark", "temperature", "num_draft_tokens")
_FILE = Path(__file__).with_name("paper_results.csv")
_COLUMNS = {"tau": "acceptance_length", "speedup": "speedup"}


@dataclass(frozen=True)
class PaperTable:
    """Rows of ``paper_results.csv`` as text, whose settings are labels; none when no table is asked for."""

    rows: pd.DataFrame

    @classmethod
    def read(cls, name: str | None, keys: Sequence[str]) -> PaperTable:
        """Table "1", "2", "4" or "figure 1".

        Raises:
            ValueError: no such table, or a key that its numbers do not have.
        """
        rows = pd.read_csv(_FILE, dtype=str, keep_default_na=False)
        if name is None:
            return cls(rows[:0])
        if unknown := [key for key in keys if key not in KEYS]:
            raise ValueError(
                f"paper={name}: its numbers have no {', '.join(unknown)}; take rows and columns from {', '.join(KEYS)}"
            )
        tables = rows["table"].str.split(",")
        chosen = rows[[str(name) in names for names in tables]]
        if chosen.empty:
            known = sorted(set(tables.explode()))
            raise ValueError(f"paper: expected one of {', '.join(map(repr, known))}, got {name!r}")
        return cls(chosen)

    def labels(self, keys: Sequence[str]) -> list[tuple[str, ...]]:
        """The different labels of some keys."""
        rows = [] if self.rows.empty else self.rows[list(keys)].itertuples(index=False, name=None)
        return list(dict.fromkeys(rows))

    def recipes(self, keys: Sequence[str]) -> list[dict[str, str]]:
        """What the authors trained, as far as ``keys`` tell it apart; the target is not part of it."""
        wanted = [key for key in keys if key in ("draft", "objective")]
        return self.rows.loc[self.rows["source"] != PUBLIC, wanted].drop_duplicates().to_dict("records")

    def value(self, settings: Mapping[str, str], measure: str) -> float | None:
        """The number at some settings, the mean where they leave several benchmarks."""
        if measure not in _COLUMNS or self.rows.empty:
            return None
        here = (self.rows[list(settings)] == list(settings.values())).all(axis=1)
        found = [float(text) for text in self.rows.loc[here, _COLUMNS[measure]] if text]
        return sum(found) / len(found) if found else None
