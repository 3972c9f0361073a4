"""The only reader and writer of run folders and results rows.

A run folder, ``<root>/<draft>-<loss>-<target>-s<seed>-<hash8>/``::

    config.yaml     the resolved configuration; written last: a folder that has it is complete
    overrides.txt   what was typed, one override a line
    git.txt         commit, uncommitted changes, hash of the package's code, time of creation
    checkpoints/    step=<n>.ckpt, last.ckpt
    tb/             TensorBoard
    metrics.json    the last value of every metric
    rounds.parquet  one row a round
    results.csv     one row a benchmark x temperature x num_draft_tokens x engine x protocol

Every file is replaced atomically: a crash leaves the old one. Only one process writes a run folder.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import json
import math
import operator
import re
import subprocess
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from lkspec.files import atomic_path, write_text

_PACKAGE = Path(__file__).parent
_LEGAL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # also a Hydra value that needs no quotes


@dataclass(frozen=True)
class RoundRow:
    """One verification of ``num_draft_tokens`` drafted tokens; the last three fields are those of ``types.Round``."""

    benchmark: str
    prompt_id: str
    turn: int
    temperature: float
    num_draft_tokens: int
    engine: str
    round: int
    position: int
    accepted: int
    past_end: bool

    @property
    def key(self) -> tuple[str, float, int, str]:
        """Rows with the same key are replaced together."""
        return self.benchmark, self.temperature, self.num_draft_tokens, self.engine


@dataclass(frozen=True)
class ResultRow:
    """One measurement of a run.

    Attributes:
        loss_args: the objective's arguments, JSON.
        data_fingerprint: of the training data.
        supervised_tokens: training tokens seen that were supervised, over all epochs.
        steps: optimiser steps taken.
        engine: what decoded (``lkspec``, or the name of a serving engine).
        tau, low, high: acceptance length and its interval.
        alpha: [K], the share of the rounds with at least k accepted tokens; columns alpha_1 .. alpha_K, and
            ``tau = 1 + sum``.
        walk_tau: the acceptance length estimated without decoding.
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
    tau: float
    low: float
    high: float
    alpha: tuple[float, ...]
    walk_tau: float | None
    tokens_per_second: float | None
    speedup: float | None
    num_prompts: int
    eta: float | None
    eta_source: str | None
    protocol: str

    @property
    def key(self) -> tuple[str, float, int, str, str]:
        """A run holds one row a key; the protocol counts by its content, not by its spelling."""
        protocol = content_hash(json.loads(self.protocol))
        return self.benchmark, self.temperature, self.num_draft_tokens, self.engine, protocol


def content_hash(content: Any) -> str:
    """First 8 hex digits of the sha256 of plain data in canonical JSON (sorted keys, no spaces)."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def run_name(
    draft: str, loss: str, target: str, *, seed: int, config: Mapping[str, Any], ignore: Collection[str] = ()
) -> str:
    """``<draft>-<loss>-<target>-s<seed>-<hash8>``, the hash over what decides the outcome of a run.

    Args:
        draft, loss, target: names; characters outside ``[A-Za-z0-9._-]`` become ``-``.
        seed: of the run.
        config: the resolved configuration.
        ignore: dotted keys (``trainer.devices``, ``logger``) that concern only the machine or the output.
    """
    names = (re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-") or "unnamed" for name in (draft, loss, target))
    return "-".join([*names, f"s{seed}", content_hash(_without(config, ignore))])


def _without(config: Mapping[str, Any], ignore: Collection[str], prefix: str = "") -> dict[str, Any]:
    kept = {}
    for key, value in config.items():
        if f"{prefix}{key}" not in ignore:
            kept[key] = _without(value, ignore, f"{prefix}{key}.") if isinstance(value, Mapping) else value
    return kept


def code_hash(package: Path = _PACKAGE) -> str:
    """sha256 over the names and contents of a package's ``.py`` files."""
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py"), key=lambda file: file.relative_to(package).as_posix()):
        digest.update(f"{file.relative_to(package).as_posix()}\0{hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class RunFolder:
    """One run's folder; make one by ``create``, ``open`` or ``find_run``."""

    path: Path

    @classmethod
    def create(cls, root: Path, name: str, *, config: Mapping[str, Any], overrides: Sequence[str]) -> RunFolder:
        """Starts a run: config.yaml, overrides.txt, git.txt.

        Raises:
            ValueError: an illegal name, or the folder holds a checkpoint or a result of an earlier run. One that died
                before its first checkpoint is taken over.
        """
        if not _LEGAL_NAME.fullmatch(name):
            raise ValueError(f"run name: expected only letters, digits and ._- (a letter or digit first), got {name!r}")
        run = cls(Path(root) / name)
        if held := run._worth_keeping():
            raise ValueError(
                f"{run.path} already holds this run ({held.name}): continue it with resume=true, "
                f"take another seed, or remove the folder"
            )
        origin = {**_git_state(), "code_hash": code_hash(), "created": datetime.now(UTC).isoformat()}
        run.checkpoints_dir.mkdir(parents=True, exist_ok=True)
        write_text(run.path / "overrides.txt", "".join(f"{override}\n" for override in overrides))
        write_text(run.path / "git.txt", "".join(f"{key}: {value}\n" for key, value in origin.items()))
        write_text(run._config_file, yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))
        return run

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """An existing run.

        Raises:
            ValueError: the folder has no config.yaml.
        """
        run = cls(Path(path))
        if not run._config_file.is_file():
            raise ValueError(f"{path} is not a run folder: expected a config.yaml in it")
        return run

    def _worth_keeping(self) -> Path | None:
        results = (self._metrics_file, self._rounds_file, self.results_file)
        return self.last_checkpoint or next((file for file in results if file.is_file()), None)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration."""
        return yaml.safe_load(self._config_file.read_text(encoding="utf-8"))

    @property
    def overrides(self) -> list[str]:
        """The overrides that were typed."""
        return (self.path / "overrides.txt").read_text(encoding="utf-8").splitlines()

    @property
    def origin(self) -> dict[str, str]:
        """``commit``, ``dirty``, ``code_hash`` and ``created`` (UTC, ISO 8601); empty for a folder made by hand."""
        file = self.path / "git.txt"
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        return dict(line.split(": ", 1) for line in lines)

    @property
    def checkpoints_dir(self) -> Path:
        return self.path / "checkpoints"

    @property
    def tb_dir(self) -> Path:
        return self.path / "tb"

    @property
    def results_file(self) -> Path:
        return self.path / "results.csv"

    @property
    def _config_file(self) -> Path:
        return self.path / "config.yaml"

    @property
    def _metrics_file(self) -> Path:
        return self.path / "metrics.json"

    @property
    def _rounds_file(self) -> Path:
        return self.path / "rounds.parquet"

    @property
    def checkpoints(self) -> list[Path]:
        """``...step=<n>.ckpt`` by step, then ``last.ckpt``; ``-v1`` of a name (Lightning's second try) after it."""
        found = [(order, file) for file in self.checkpoints_dir.glob("*.ckpt") if (order := _checkpoint_order(file))]
        return [file for _, file in sorted(found)]

    @property
    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint; None before the first."""
        return next(reversed(self.checkpoints), None)

    def write_metrics(self, metrics: Mapping[str, float | int | str | None]) -> None:
        """Merges into metrics.json; a value that is not finite becomes null, as JSON has no nan."""
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in metrics.items()
        }
        write_text(self._metrics_file, json.dumps({**self.read_metrics(), **finite}, indent=2, allow_nan=False) + "\n")

    def read_metrics(self) -> dict[str, float | int | str | None]:
        """metrics.json; empty before the first write."""
        return json.loads(self._metrics_file.read_text(encoding="utf-8")) if self._metrics_file.is_file() else {}

    def write_rounds(self, rows: Iterable[RoundRow]) -> None:
        """Adds rows to rounds.parquet in place of those with a key that is among the new ones."""
        new = list(rows)
        table = pa.Table.from_pylist([asdict(row) for row in new], schema=_ROUND_SCHEMA)
        if self._rounds_file.is_file() and new:
            old = pq.read_table(self._rounds_file)
            table = pa.concat_tables([old.filter(pc.invert(_with_keys(old, {row.key for row in new}))), table])
        if new:
            with atomic_path(self._rounds_file) as temporary:
                pq.write_table(table, temporary)

    def read_rounds(self) -> list[RoundRow]:
        """All rounds; none before the first write."""
        if not self._rounds_file.is_file():
            return []
        return [RoundRow(**row) for row in pq.read_table(self._rounds_file).to_pylist()]

    def write_results(self, rows: Iterable[ResultRow]) -> None:
        """Adds rows to results.csv in place of those with the same key."""
        new = list(rows)
        replaced = {row.key for row in new}
        write_result_rows(self.results_file, [*(row for row in self.read_results() if row.key not in replaced), *new])

    def read_results(self) -> list[ResultRow]:
        """The rows of results.csv; none before the first write."""
        return read_result_rows(self.results_file) if self.results_file.is_file() else []


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
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        header = reader.fieldnames or []
        expected = {field.name for field in fields(ResultRow)} - {"alpha"}
        given = {name for name in header if not name.startswith("alpha_")}
        if given != expected:
            raise ValueError(
                f"{path}: expected the columns of a results row; missing {sorted(expected - given) or 'none'}, "
                f"unknown {sorted(given - expected) or 'none'}: it was written by another version of lkspec"
            )
        return [_parse_row(row, f"{path}:{reader.line_num}") for row in reader]
