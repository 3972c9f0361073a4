"""Where the rows of a benchmark come from: a JSONL file, a local copy of a public one, or the hub."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Unpack

from lkspec.benchmarks.base import Asking, Benchmark, BenchmarkPrompt
from lkspec.files import read_jsonl

_DATA_VARIABLE = "LKSPEC_DATA"


@dataclass(frozen=True)
class FileRow:
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
            raise ValueError(f"{self.where}: expected a text in {key!r}, got {value!r:.60}")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """A field that must be a non-empty list of such texts."""
        values = self.values.get(key)
        if not isinstance(values, list) or not values:
            raise ValueError(f"{self.where}: expected a list of texts in {key!r}, got {values!r:.60}")
        return tuple(FileRow({key: value}, self.where).text(key) for value in values)


class PublicBenchmark(Benchmark):
    """A benchmark whose rows come from a local copy of its public file, or from the hub.

    Attributes:
        folder: its folder inside the data folder, and its name unless told otherwise.
        file_names: what its file may be called there.
        origin: where to get that file.
        hub_path, hub_config, hub_split: the same rows as a data set of the hub.

    Args:
        source: "files" or "hub".
        data_dir: the data folder; None is the one that the environment variable LKSPEC_DATA names.

    Raises:
        ValueError: another source, a file that is not there or not JSONL, a hub that cannot be reached, or a row that
            is not the benchmark's.
    """

    folder: ClassVar[str]
    file_names: ClassVar[tuple[str, ...]]
    origin: ClassVar[str]
    hub_path: ClassVar[str]
    hub_config: ClassVar[str | None]
    hub_split: ClassVar[str]

    def __init__(
        self, *, name: str | None = None, source: str = "files", data_dir: str | None = None, **asking: Unpack[Asking]
    ) -> None:
        if source not in ("files", "hub"):
            raise ValueError(f"benchmark.source: expected files or hub, got {source!r}")
        rows = self._hub_rows() if source == "hub" else read_rows(self._find(data_dir))
        super().__init__([self.prompt(row, i) for i, row in enumerate(rows)], name=name or self.folder, **asking)

    @staticmethod
    def prompt(row: FileRow, index: int) -> BenchmarkPrompt:
        """A row of the file, or of the hub's copy, as a prompt."""
        raise NotImplementedError

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

    def _hub_rows(self) -> list[FileRow]:
        from datasets import load_dataset  # slow to import, and only this source needs it

        try:
            rows = load_dataset(self.hub_path, self.hub_config, split=self.hub_split)
        except OSError as error:
            raise ValueError(
                f"benchmark.source=hub: {self.hub_path} could not be read ({error}); check the connection, or download "
                f"the file from {self.origin} and set benchmark.source=files benchmark.data_dir=<folder>"
            ) from error
        return [FileRow(dict(values), f"{self.hub_path}[{i}]") for i, values in enumerate(rows)]


def read_rows(path: Path) -> list[FileRow]:
    """Rows of a JSONL file, gzipped or not.

    Raises:
        ValueError: a line that is not a JSON object, or no row at all.
    """
    rows = [FileRow(values, f"{path}:{number}") for number, values in read_jsonl(path)]
    if not rows:
        raise ValueError(f"{path}: the file has no rows")
    return rows
