"""Parquet tables of rows: a dataclass of plain fields gives the columns.

pyarrow is imported where it is used: finding a run does without.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lkspec.files import atomic_path

if TYPE_CHECKING:
    import pyarrow as pa

_TYPES = {"str": "string", "int": "int64", "float": "float64", "bool": "bool"}


def as_table(row_class: type[Any], rows: Sequence[Any]) -> pa.Table:
    """Rows as a table with a column a field."""
    import pyarrow as pa

    schema = pa.schema([(field.name, _TYPES[str(field.type)]) for field in fields(row_class)])
    return pa.Table.from_pylist([vars(row) for row in rows], schema=schema)


def write_table(path: Path, table: pa.Table) -> None:
    """Replaces a file."""
    import pyarrow.parquet as pq

    with atomic_path(path) as temporary:
        pq.write_table(table, temporary)


def read_table(path: Path, row_class: type[Any]) -> pa.Table:
    """A file of such rows, a column a field.

    Raises:
        ValueError: it has other columns.
    """
    import pyarrow.parquet as pq

    table, expected = pq.read_table(path), as_table(row_class, []).schema
    if set(table.column_names) != set(expected.names):
        missing, unknown = (
            sorted(set(expected.names) - set(table.column_names)),
            sorted(set(table.column_names) - set(expected.names)),
        )
        raise ValueError(
            f"{path}: expected the columns of a {row_class.__name__}; missing {missing or 'none'}, unknown "
            f"{unknown or 'none'}: it was written by another version of lkspec"
        )
    return table.select(expected.names).cast(expected)
