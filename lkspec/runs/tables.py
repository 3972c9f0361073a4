"""Tables of rows, a dataclass of plain fields giving the columns: .csv to be read by people, .parquet for many rows.

Every file is replaced atomically: a crash leaves the old one.
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lkspec.files import atomic_path

if TYPE_CHECKING:  # pyarrow is imported where a table is read or written: finding a run does without
    import pyarrow as pa

RowT = TypeVar("RowT")
_ARROW = {"str": "string", "int": "int64", "float": "double", "bool": "bool"}
_CELLS: dict[str, Callable[[str], Any]] = {
    "str": str,
    "int": int,
    "float": float,
    "float | None": lambda text: float(text) if text else None,
    "str | None": lambda text: text or None,
}
_NUMBERED = "tuple[float, ...]"  # a field whose entries have columns of their own, <name>_1 ..; csv only


def read_rows(path: Path, row_class: type[RowT]) -> list[RowT]:
    """The rows of a file, typed; none where there is no file.

    Raises:
        ValueError: a column is missing or unknown, or a cell of a csv file is not of its column's type.
    """
    if path.suffix == ".parquet":
        table = read_table(path, row_class)
        return [] if table is None else [row_class(**row) for row in table.to_pylist()]
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file, restval="")
        types = _types(row_class)
        numbered = {name for name, kind in types.items() if kind == _NUMBERED}
        given = {name for name in reader.fieldnames or [] if name.rpartition("_")[0] not in numbered}
        _check_columns(path, row_class, types.keys() - numbered, given)
        return [row_class(**_parsed(row, types, f"{path}:{reader.line_num}")) for row in reader]


def read_table(path: Path, row_class: type[Any]) -> pa.Table | None:
    """A parquet file of such rows, a column a field; None where there is no file.

    Raises:
        ValueError: it has other columns.
    """
    if not path.is_file():
        return None
    import pyarrow.parquet as pq

    table, schema = pq.read_table(path), _as_table(row_class, []).schema
    _check_columns(path, row_class, set(schema.names), set(table.column_names))
    return table.select(schema.names).cast(schema)


def write_rows(path: Path, row_class: type[RowT], rows: Sequence[RowT]) -> None:
    """Replaces a file; floats read back exactly, None is an empty cell of a csv file."""
    if path.suffix == ".parquet":
        _write_parquet(path, _as_table(row_class, rows))
        return
    cells = [dict(_cells(row)) for row in rows]
    plain = [name for name, kind in _types(row_class).items() if kind != _NUMBERED]
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(max(cells, key=len, default=plain)), restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(cells)


def add_rows(path: Path, row_class: type[Any], rows: Iterable[Any]) -> None:
    """Adds rows in place of those with the same ``row_key``."""
    write_rows(path, row_class, list({row.row_key: row for row in [*read_rows(path, row_class), *rows]}.values()))


def replace_rows(path: Path, row_class: type[Any], rows: Sequence[Any], *, by: Sequence[str]) -> None:
    """Adds rows to a parquet file in place of all that agree with one of them in some columns."""
    if not rows:
        return
    import pyarrow as pa

    table, old = _as_table(row_class, rows), read_table(path, row_class)
    if old is not None:
        replaced = {tuple(getattr(row, name) for name in by) for row in rows}
        keys = zip(*(old[name].to_pylist() for name in by), strict=True)
        table = pa.concat_tables([old.filter([key not in replaced for key in keys]), table])
    _write_parquet(path, table)


def _types(row_class: type[Any]) -> dict[str, str]:
    return {field.name: str(field.type) for field in fields(row_class)}


def _as_table(row_class: type[Any], rows: Sequence[Any]) -> pa.Table:
    import pyarrow as pa

    schema = pa.schema([(name, pa.type_for_alias(_ARROW[kind])) for name, kind in _types(row_class).items()])
    return pa.Table.from_pylist([vars(row) for row in rows], schema=schema)


def _write_parquet(path: Path, table: pa.Table) -> None:
    import pyarrow.parquet as pq

    with atomic_path(path) as temporary:
        pq.write_table(table, temporary)


def _check_columns(path: Path, row_class: type[Any], expected: set[str], given: set[str]) -> None:
    if given != expected:
        raise ValueError(
            f"{path}: expected the columns of a {row_class.__name__}; missing {sorted(expected - given) or 'none'}, "
            f"unknown {sorted(given - expected) or 'none'}: it was written by another version of lkspec"
        )


def _cells(row: Any) -> Iterable[tuple[str, Any]]:
    for name, value in vars(row).items():
        if isinstance(value, tuple):
            yield from ((f"{name}_{number}", entry) for number, entry in enumerate(value, start=1))
        else:
            yield name, value


def _parsed(row: Mapping[str, str], types: Mapping[str, str], where: str) -> dict[str, Any]:
    def cell(name: str, parse: Callable[[str], Any]) -> Any:
        try:
            return parse(row[name])
        except ValueError as error:
            raise ValueError(f"{where}: column {name}: {error}") from error

    values = {}
    for name, kind in types.items():
        if kind == _NUMBERED:
            numbered = itertools.takewhile(row.get, (f"{name}_{number}" for number in itertools.count(1)))
            values[name] = tuple(cell(column, float) for column in numbered)
        else:
            values[name] = cell(name, _CELLS[kind])
    return values
