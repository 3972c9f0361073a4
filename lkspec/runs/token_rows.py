"""The rows of tokens.parquet: the tokens of some held-out answers, and how likely a proposal is accepted at each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lkspec.runs.tables import as_table, read_table, write_table

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class TokenRow:
    """One token x of an answer as a proposal at depth k.

    Attributes:
        conversation: whose answer.
        position: of the token in its answer, from 0.
        text: the token.
        depth: k.
        alpha: the acceptance rate there.
        accept_prob: min(1, q(x) / p(x)).
        entropy: of the target's distribution there, in nats.
        coverage: target mass inside the draft vocabulary there.
    """

    conversation: str
    position: int
    text: str
    depth: int
    alpha: float
    accept_prob: float
    entropy: float
    coverage: float


def write_token_rows(path: Path, rows: Sequence[TokenRow]) -> None:
    """Replaces a tokens.parquet."""
    write_table(path, as_table(TokenRow, rows))


def read_token_table(path: Path) -> pa.Table:
    """A tokens.parquet, a column a field of ``TokenRow``.

    Raises:
        ValueError: it has other columns.
    """
    return read_table(path, TokenRow)
