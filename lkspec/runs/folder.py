"""The only reader and writer of run folders (rows.py: what the rows of their tables hold; tables.py: their files).

A run folder, ``<root>/<draft>-<loss>-<target>-s<seed>-<hash8>/``::

    config.yaml     the resolved configuration; written last: a folder that has it is complete
    overrides.txt   what was typed, one override a line
    git.txt         commit, uncommitted changes, time of creation
    checkpoints/    step=<n>.ckpt, last.ckpt
    tb/             TensorBoard
    metrics.json    the last value of every metric
    rounds.parquet  one row a round
    walk.parquet    one row a held-out conversation x depth x sharpness, of validation or `lkspec walk`
    tokens.parquet  one row a token x depth of some answers that were walked, written at T = 1
    results.csv     one row a setting (benchmark, temperature, num_draft_tokens, engine, sharpness) x protocol x steps
    identity.json   what besides its configuration the run's numbers depend on (see identity.py)
    failure.txt     why the last attempt ended in an error; gone with the next attempt
    throughput.csv  one row a concurrency x num_draft_tokens x engine x protocol x training steps

Every file is replaced atomically: a crash leaves the old one. Only one process writes a run folder.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lkspec.files import write_text
from lkspec.runs.identity import code_hash
from lkspec.runs.rows import SETTING, ResultRow, RoundRow, ThroughputRow, TokenRow, WalkRow, content_hash
from lkspec.runs.tables import add_rows, read_rows, read_table, replace_rows, write_rows

if TYPE_CHECKING:
    import pyarrow as pa

_PACKAGE = Path(__file__).parents[1]
_LEGAL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # also a Hydra value that needs no quotes


def run_name(draft: str, loss: str, target: str, *, seed: int, outcome: Mapping[str, Any]) -> str:
    """``<draft>-<loss>-<target>-s<seed>-<hash8>``, the hash over what decides the outcome of a run (see keys.py).

    Characters of the names outside ``[A-Za-z0-9._-]`` become ``-``.
    """
    names = (re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("._-") or "unnamed" for name in (draft, loss, target))
    return "-".join([*names, f"s{seed}", content_hash(outcome)])


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
        run.refuse_results()
        origin = {**_git_state(), "created": datetime.now(UTC).isoformat(timespec="microseconds")}
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

    def refuse_results(self) -> None:
        """Refuses to start a run where one has got as far as a checkpoint or a result.

        Raises:
            ValueError: it has.
        """
        if held := self._worth_keeping():
            raise ValueError(
                f"{self.path} already holds this run ({held.name}): continue it with resume={self.name}, start it "
                "again with on_existing=replace, take another seed, or remove the folder"
            )

    def _worth_keeping(self) -> Path | None:
        """A checkpoint or a result, if there is any."""
        results = (self._metrics_file, self.path / "rounds.parquet", self.results_file)
        return next((file for file in [*self.checkpoints_dir.glob("*.ckpt"), *results] if file.exists()), None)

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
        """``commit``, ``dirty`` and ``created`` (UTC, ISO 8601); empty for a folder made by hand."""
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
    def throughput_file(self) -> Path:
        return self.path / "throughput.csv"

    @property
    def figures_dir(self) -> Path:
        """Where pictures go."""
        return self.path / "figures"

    @property
    def has_results(self) -> bool:
        """Whether the run got as far as a checkpoint or a result: what ``create`` does not overwrite."""
        return self._worth_keeping() is not None

    @property
    def is_finished(self) -> bool:
        """Whether training and measuring came to their end, where metrics.json is written."""
        return self._metrics_file.is_file()

    def remove(self) -> None:
        """Deletes the folder with everything in it."""
        shutil.rmtree(self.path)

    def set_aside(self) -> Path:
        """Moves the folder to ``<root>/stale/<name>-<n>``, where no report looks for runs; returns that place."""
        stale = self.path.parent / "stale"
        stale.mkdir(exist_ok=True)
        number = next(n for n in itertools.count(1) if not (stale / f"{self.name}-{n}").exists())
        return self.path.rename(stale / f"{self.name}-{number}")

    def write_identity(self, identity: Mapping[str, Any]) -> None:
        """Writes identity.json."""
        write_text(self.path / "identity.json", json.dumps(dict(identity), indent=2) + "\n")

    @property
    def code_hash(self) -> str:
        """8 hex digits for the code that trained the run; empty where no identity was written."""
        identity = self.read_identity()
        return "" if identity is None else code_hash(identity["trained_by"])

    def read_identity(self) -> dict[str, Any] | None:
        """identity.json; None where none was written."""
        return _read_json(self.path / "identity.json")

    def write_failure(self, text: str | None) -> None:
        """Writes failure.txt; None removes it."""
        if text is None:
            self.failure_file.unlink(missing_ok=True)
        else:
            write_text(self.failure_file, text)

    @property
    def failure_file(self) -> Path:
        """Where the error stands that ended the last attempt."""
        return self.path / "failure.txt"

    @property
    def has_failed(self) -> bool:
        """Whether the last attempt ended in an error."""
        return self.failure_file.is_file()

    def read_depth_history(self, prefix: str) -> list[tuple[int, list[float]]]:
        """(step, [value at depth 1..K]) of the TensorBoard scalars ``<prefix>/depth_<k>``; empty without any."""
        if not self.tb_dir.is_dir():  # another logger, or none
            return []
        from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
            SCALARS,
            EventAccumulator,
        )

        events = EventAccumulator(str(self.tb_dir), size_guidance={SCALARS: 0})
        events.Reload()
        tags = sorted(
            (tag for tag in events.Tags()["scalars"] if tag.startswith(f"{prefix}/depth_")),
            key=lambda tag: int(tag.rpartition("_")[2]),
        )
        series = [{event.step: event.value for event in events.Scalars(tag)} for tag in tags]
        steps = sorted(set.intersection(*(set(values) for values in series))) if series else []
        return [(step, [values[step] for values in series]) for step in steps]

    @property
    def _config_file(self) -> Path:
        return self.path / "config.yaml"

    @property
    def _metrics_file(self) -> Path:
        return self.path / "metrics.json"

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
        return _read_json(self._metrics_file) or {}

    def write_rounds(self, rows: Iterable[RoundRow]) -> None:
        """Adds rows to rounds.parquet in place of those of the same settings."""
        replace_rows(self.path / "rounds.parquet", RoundRow, list(rows), by=SETTING)

    def read_rounds(self) -> list[RoundRow]:
        """All rounds; none before the first write."""
        return read_rows(self.path / "rounds.parquet", RoundRow)

    def read_round_table(self) -> pa.Table | None:
        """All rounds as columns, for those who count many; None before the first write."""
        return read_table(self.path / "rounds.parquet", RoundRow)

    def write_walk(self, rows: Sequence[WalkRow]) -> None:
        """Replaces walk.parquet."""
        write_rows(self.path / "walk.parquet", WalkRow, rows)

    def add_walk(self, rows: Sequence[WalkRow]) -> None:
        """Adds rows to walk.parquet in place of those with the same conversation, temperature, depth and sharpness."""
        add_rows(self.path / "walk.parquet", WalkRow, rows)

    def read_walk_table(self) -> pa.Table | None:
        """The walk along the held-out conversations, a column a field of ``WalkRow``; None before the first write."""
        return read_table(self.path / "walk.parquet", WalkRow)

    def write_tokens(self, rows: Sequence[TokenRow]) -> None:
        """Replaces tokens.parquet."""
        write_rows(self.path / "tokens.parquet", TokenRow, rows)

    def read_token_table(self) -> pa.Table | None:
        """Statistics of held-out tokens, a column a field of ``TokenRow``; None before the first write."""
        return read_table(self.path / "tokens.parquet", TokenRow)

    def write_results(self, rows: Iterable[ResultRow]) -> None:
        """Adds rows to results.csv in place of those with the same key (setting, protocol and training steps)."""
        add_rows(self.results_file, ResultRow, rows)

    def read_results(self) -> list[ResultRow]:
        """The rows of results.csv; none before the first write."""
        return read_rows(self.results_file, ResultRow)

    def write_throughput(self, rows: Iterable[ThroughputRow]) -> None:
        """Adds rows to throughput.csv in place of those with the same key."""
        add_rows(self.throughput_file, ThroughputRow, rows)

    def read_throughput(self) -> list[ThroughputRow]:
        """The rows of throughput.csv; none before the first write."""
        return read_rows(self.throughput_file, ThroughputRow)


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _git_state() -> dict[str, str]:
    """Commit and uncommitted changes of the package, ``none`` when it does not run from a git checkout."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(_PACKAGE), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        # An installed package may lie inside somebody else's checkout: only a tracked one has a commit of its own.
        git("ls-files", "--error-unmatch", "__init__.py")
        return {"commit": git("rev-parse", "HEAD"), "dirty": "yes" if git("status", "--porcelain", "--", ".") else "no"}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": "none", "dirty": "none"}


def _checkpoint_order(file: Path) -> tuple[float, int] | None:
    """(step, version); ``last`` comes after every step; None for other names, whose step is unknown."""
    match = re.fullmatch(r"(?:last|.*step=(\d+).*?)(?:-v(\d+))?\.ckpt", file.name)
    return (float(match[1] or "inf"), int(match[2] or 0)) if match else None
