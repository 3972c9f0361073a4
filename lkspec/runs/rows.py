"""The rows of a run's tables: rounds.parquet, results.csv, throughput.csv; the only code that writes or reads them.

Every table is replaced atomically: a crash leaves the old file.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lkspec.files import atomic_path
from lkspec.runs.tables import as_table, read_table, write_table

if TYPE_CHECKING:
    import pyarrow as pa

#: What tells measurements of a run apart, and columns by these names.
SETTING = ("benchmark", "temperature", "num_draft_tokens", "engine", "sharpness")
SettingKey = tuple[str, float, int, str, float]


@dataclass(frozen=True)
class RoundRow:
    """One verification of ``num_draft_tokens`` drafted tokens; the last three fields are those of ``types.Round``."""

    benchmark: str
    prompt_id: str
    turn: int
    temperature: float
    num_draft_tokens: int
    engine: str
    sharpness: float
    round: int
    position: int
    accepted: int
    past_end: bool

    @property
    def setting(self) -> SettingKey:
        """Rows of one setting are replaced together."""
        return self.benchmark, self.temperature, self.num_draft_tokens, self.engine, self.sharpness


@dataclass(frozen=True)
class ResultRow:
    """One measurement of a run.

    Attributes:
        loss_args: the objective's arguments, JSON.
        data_fingerprint: of the training data.
        supervised_tokens: training tokens seen that were supervised, over all epochs.
        steps: optimiser steps taken.
        engine: what decoded (``lkspec``, or the name of a serving engine).
        sharpness: s of the q^s, renormalised, that was served in place of q; 1 at T = 0, where it changes nothing.
        tau, low, high: acceptance length and its interval.
        alpha: [K], the share of the rounds with at least k accepted tokens; columns alpha_1 .. alpha_K, and
            ``tau = 1 + sum``.
        tau_whole_rounds: tau over the rounds whose K proposals lie inside the text, as the walk counts them.
        walk_tau: the acceptance length estimated without decoding, along the same text.
        walk_over_k: the same with rounds of 1, 2, .. num_draft_tokens drafted tokens, a JSON list.
        speedup: tokens_per_second over those of the target alone.
        eta, eta_source: the adaptive weight's eta and who chose it.
        protocol: everything else that tau depends on (filters, limits, templates, number of prompts), JSON.
    """

    run: str
    commit: str
    code_hash: str
    draft: str
    loss: str
    loss_args: str
    target: str
    data_fingerprint: str
    seed: int
    supervised_tokens: int
    steps: int
    benchmark: str
    temperature: float
    num_draft_tokens: int
    engine: str
    sharpness: float
    tau: float
    low: float
    high: float
    alpha: tuple[float, ...]
    tau_whole_rounds: float | None
    walk_tau: float | None
    walk_over_k: str
    tokens_per_second: float | None
    speedup: float | None
    num_prompts: int
    eta: float | None
    eta_source: str | None
    protocol: str

    @property
    def setting(self) -> SettingKey:
        """What its rounds are known by."""
        return self.benchmark, self.temperature, self.num_draft_tokens, self.engine, self.sharpness

    @property
    def name(self) -> str:
        """Of the measurement among those of a run, in logs."""
        return measurement_name(self.benchmark, self.temperature, self.num_draft_tokens, self.sharpness)

    @property
    def key(self) -> tuple[SettingKey, str, int]:
        """A run holds one row a key; the protocol counts by its content, not by its spelling.

        The steps are part of it: measurements before and after training stand side by side.
        """
        return self.setting, content_hash(json.loads(self.protocol)), self.steps


@dataclass(frozen=True)
class ThroughputRow:
    """Speed of a serving engine at one K (0: without drafting) and one number of requests at a time.

    Attributes:
        hardware: what the engine runs on; ``CPU``, or ``unknown hardware`` where a server does not tell.
        tokens_per_second: output tokens of all requests over the wall time.
        median_ms_per_token, p95_ms_per_token: over requests, of the time per output token after the first.
        protocol: everything else that it depends on, JSON.
    """

    run: str
    draft: str
    loss: str
    target: str
    steps: int
    engine: str
    hardware: str
    temperature: float
    num_draft_tokens: int
    concurrency: int
    num_requests: int
    num_tokens: int
    tokens_per_second: float
    median_ms_per_token: float
    p95_ms_per_token: float
    protocol: str

    @property
    def setting(self) -> tuple[str | float, ...]:
        """Rows of one setting can be compared over K and concurrency."""
        protocol = content_hash(json.loads(self.protocol))
        return self.engine, self.hardware, self.temperature, self.num_requests, protocol, self.steps

    @property
    def key(self) -> tuple[str | float, ...]:
        """A run holds one row a key."""
        return (*self.setting, self.num_draft_tokens, self.concurrency)


Row = TypeVar("Row", ResultRow, ThroughputRow)


def measurement_name(benchmark: str, temperature: float, num_draft_tokens: int, sharpness: float) -> str:
    """``<benchmark>/T<temperature>/K<num_draft_tokens>``, and ``/s<sharpness>`` where q is not as trained."""
    sharpened = "" if sharpness == 1 else f"/s{sharpness:g}"
    return f"{benchmark}/T{temperature:g}/K{num_draft_tokens}{sharpened}"


def content_hash(content: Any) -> str:
    """First 8 hex digits of the sha256 of plain data in canonical JSON (sorted keys, no spaces)."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def replace_rounds(path: Path, rows: Sequence[RoundRow]) -> None:
    """Adds rows to a rounds.parquet in place of those of the same settings."""
    if not rows:
        return
    import pyarrow as pa
    import pyarrow.compute as pc

    table = as_table(RoundRow, rows)
    if path.is_file():
        old = read_round_table(path)
        stale = _of_settings(old, {row.setting for row in rows})
        table = pa.concat_tables([old.filter(pc.invert(stale)), table])
    write_table(path, table)


def read_round_table(path: Path) -> pa.Table:
    """A rounds.parquet, a column a field of ``RoundRow``.

    Raises:
        ValueError: it has other columns.
    """
    return read_table(path, RoundRow)


def write_result_rows(path: Path, rows: Sequence[ResultRow]) -> None:
    """Writes a results.csv; floats read back exactly, None is an empty cell, alpha_k has as many columns as needed."""
    num_alpha = max((len(row.alpha) for row in rows), default=0)
    header: list[str] = []
    for field in fields(ResultRow):
        header += [f"alpha_{k}" for k in range(1, num_alpha + 1)] if field.name == "alpha" else [field.name]
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, header, restval="", lineterminator="\n")
        writer.writeheader()
        for row in rows:
            cells = {field.name: getattr(row, field.name) for field in fields(row) if field.name != "alpha"}
            cells |= {f"alpha_{k}": value for k, value in enumerate(row.alpha, start=1)}
            writer.writerow({name: _cell(value) for name, value in cells.items()})


def read_result_rows(path: Path) -> list[ResultRow]:
    """Reads a results.csv, typed.

    Raises:
        ValueError: a column is missing or unknown, or a cell is not of its column's type (file, line and column).
    """
    return _read_csv(path, ResultRow)


def write_throughput_rows(path: Path, rows: Sequence[ThroughputRow]) -> None:
    """Writes a throughput.csv; floats read back exactly."""
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(ThroughputRow)], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({name: _cell(value) for name, value in vars(row).items()})


def read_throughput_rows(path: Path) -> list[ThroughputRow]:
    """Reads a throughput.csv, typed.

    Raises:
        ValueError: as ``read_result_rows``.
    """
    return _read_csv(path, ThroughputRow)


def _read_csv(path: Path, row_class: type[Row]) -> list[Row]:
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file, restval="")
        header = reader.fieldnames or []
        expected = {field.name for field in fields(row_class)} - {"alpha"}
        given = {name for name in header if not name.startswith("alpha_")}
        if given != expected:
            raise ValueError(
                f"{path}: expected the columns of a {row_class.__name__}; "
                f"missing {sorted(expected - given) or 'none'}, unknown {sorted(given - expected) or 'none'}: "
                "it was written by another version of lkspec"
            )
        return [_parse_row(row, row_class, f"{path}:{reader.line_num}") for row in reader]


def _of_settings(table: pa.Table, settings: Collection[SettingKey]) -> pa.ChunkedArray:
    """Mask of the rows whose setting is among some."""
    import pyarrow.compute as pc

    masks = (
        functools.reduce(pc.and_, (pc.equal(table[name], value) for name, value in zip(SETTING, key, strict=True)))
        for key in settings
    )
    return functools.reduce(pc.or_, masks)


def _cell(value: str | float | int | None) -> str:
    return "" if value is None else repr(float(value)) if isinstance(value, float) else str(value)


_CELL_TYPES: dict[str, Callable[[str], Any]] = {
    "str": str,
    "int": int,
    "float": float,
    "float | None": lambda text: float(text) if text else None,
    "str | None": lambda text: text or None,
}


def _parse_row(row: Mapping[str, str], row_class: type[Row], where: str) -> Row:
    values: dict[str, Any] = {}
    for field in fields(row_class):
        if field.name == "alpha":
            names = itertools.takewhile(row.get, (f"alpha_{k}" for k in itertools.count(1)))
            values["alpha"] = tuple(_parse_cell(row, name, float, where) for name in names)
        else:
            values[field.name] = _parse_cell(row, field.name, _CELL_TYPES[str(field.type)], where)
    return row_class(**values)


def _parse_cell(row: Mapping[str, str], name: str, parse: Callable[[str], Any], where: str) -> Any:
    try:
        return parse(row[name])
    except ValueError as error:
        raise ValueError(f"{where}: column {name}: {error}") from error
