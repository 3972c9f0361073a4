"""The rows of tokens.parquet: the tokens of some held-out answers, and how likely a proposal is accepted at each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from lkspec.files import atomic_path


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


_TYPES = {"str": pa.string(), "int": pa.int64(), "float": pa.float64()}
_SCHEMA = pa.schema([(field.name, _TYPES[str(field.type)]) for field in fields(TokenRow)])


def write_token_rows(path: Path, rows: Sequence[TokenRow]) -> None:
    """Replaces a tokens.parquet."""
    with atomic_path(path) as temporary:
        pq.write_table(pa.Table.from_pylist([vars(row) for row in rows], schema=_SCHEMA), temporary)


def read_token_table(path: Path) -> pa.Table:
    """A tokens.parquet, a column a field of ``TokenRow``."""
    return pq.read_table(path, schema=_SCHEMA)
