"""Where the rows of a benchmark come from: a local copy of its upstream file, or the hub."""

from __future__ import annotations

import gzip
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_DATA_VARIABLE = "LKSPEC_DATA"


@dataclass(frozen=True)
class Row:
    """One row of a file and where it stands, for messages."""

    values: dict[str, Any]
    where: str

    def text(self, key: str) -> str:
        """A field that must be a text with something in it.

        Raises:
            ValueError: it is missing, empty or of another type.
        """
        value = self.values.get(key)
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{self.where}: expected a text in {key!r}, got {_shortened(value)}")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """A field that must be a non-empty list of such texts."""
        values = self.values.get(key)
        if not isinstance(values, list) or not values:
            raise ValueError(f"{self.where}: expected a list of texts in {key!r}, got {_shortened(values)}")
        return tuple(Row({key: value}, self.where).text(key) for value in values)


@dataclass(frozen=True)
class Upstream:
    """The public origin of a benchmark.

    Attributes:
        folder: its folder inside the data folder.
        file_names: what its file may be called there.
        origin: where to get that file.
        hub_path, hub_config, hub_split: the same rows as a data set of the hub.
    """

    folder: str
    file_names: tuple[str, ...]
    origin: str
    hub_path: str
    hub_config: str | None
    hub_split: str

    def rows(self, *, source: str, data_dir: str | None) -> list[Row]:
        """All rows, from ``source`` "files" or "hub".

        Raises:
            ValueError: another source, a file that is not there or not JSONL, a hub that cannot be reached.
        """
        if source == "files":
            return read_jsonl(self._find(data_dir))
        if source == "hub":
            return self._hub_rows()
        raise ValueError(f"benchmark.source: expected files or hub, got {source!r}")

    def _find(self, data_dir: str | None) -> Path:
        named = data_dir or os.environ.get(_DATA_VARIABLE)
        root = Path(named).expanduser() if named else None
        folders = [root / self.folder, root / "benchmarks" / self.folder] if root else []
        candidates = [folder / name for folder in folders for name in self.file_names]
        for path in candidates:
            if path.is_file():
                return path
        looked = ", ".join(map(str, candidates)) or f"nowhere: neither benchmark.data_dir nor {_DATA_VARIABLE} is set"
        raise ValueError(
            f"{self.folder}: its file was not found (looked at {looked}). Download it from {self.origin} into "
            f"<folder>/{self.folder}/ and set benchmark.data_dir=<folder> (or {_DATA_VARIABLE}), or set "
            f"benchmark.source=hub to read {self.hub_path} from the Hugging Face hub"
        )

    def _hub_rows(self) -> list[Row]:
        from datasets import load_dataset  # slow to import, and only this source needs it

        try:
            rows = load_dataset(self.hub_path, self.hub_config, split=self.hub_split)
        except OSError as error:
            raise ValueError(
                f"benchmark.source=hub: {self.hub_path} could not be read ({error}); check the connection, or download "
                f"the file from {self.origin} and set benchmark.source=files benchmark.data_dir=<folder>"
            ) from error
        return [Row(dict(values), f"{self.hub_path}[{i}]") for i, values in enumerate(rows)]


def read_jsonl(path: Path) -> list[Row]:
    """Rows of a JSONL file, gzipped or not; empty lines are skipped.

    Raises:
        ValueError: a line that is not a JSON object, or no row at all.
    """
    rows = []
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                rows.append(Row(_parsed(line, f"{path}:{number}"), f"{path}:{number}"))
    if not rows:
        raise ValueError(f"{path}: the file has no rows")
    return rows


def _parsed(line: str, where: str) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected a JSON object, got {_shortened(values)}")
    return values


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
