"""The rows of walk.parquet: what validation, or `lkspec evaluate`, saw of each held-out conversation at each depth.

The sums of a conversation are kept, not only those of the set, so that two runs can be compared conversation by
conversation: most of the spread between texts is shared and cancels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lkspec.runs.tables import as_table, read_table, write_table

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class WalkRow:
    """One held-out conversation at depth k.

    Attributes:
        conversation: its name.
        key: 32 hex digits of its tokens (``types.text_key``): what runs are paired by.
        temperature: at which the target wrote it.
        steps: optimiser steps taken before.
        depth: k.
        sharpness: s of the q^s that was walked with, renormalised, in place of q; 1 at T = 0, where it changes nothing.
        num_tokens: tokens supervised at depth k.
        alpha: sum of the acceptance rate over them, at that temperature (T = 0: at 1).
        rounds, accepted: expected ones of the walk with rounds of k drafted tokens; 0 where the answer is too short.
        at_least: expected rounds, of the walk with the largest k, that accept at least k tokens.
    """

    conversation: str
    key: str
    temperature: float
    steps: int
    depth: int
    sharpness: float
    num_tokens: int
    alpha: float
    rounds: float
    accepted: float
    at_least: float

    @property
    def setting(self) -> tuple[str, float, int, float]:
        """A run holds one row a key."""
        return self.key, self.temperature, self.depth, self.sharpness


def write_walk_rows(path: Path, rows: Sequence[WalkRow]) -> None:
    """Replaces a walk.parquet."""
    write_table(path, as_table(WalkRow, rows))


def read_walk_table(path: Path) -> pa.Table:
    """A walk.parquet, a column a field of ``WalkRow``.

    Raises:
        ValueError: it has other columns.
    """
    return read_table(path, WalkRow)
