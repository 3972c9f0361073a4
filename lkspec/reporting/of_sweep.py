"""The table that a sweep ends in: what its jobs differ in as rows, and the command that lays it out again."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lkspec.reporting.counts import read_series
from lkspec.reporting.layout import Layout
from lkspec.reporting.model import Table
from lkspec.reporting.tables import build_table
from lkspec.runs.folder import RunFolder

_NOT_SETTINGS = ("seed", "run_root", "hydra")  # no rows: means are over seeds
_BASELINE = "kl"


@dataclass(frozen=True)
class SweepTable:
    """A table over the jobs of a sweep.

    Attributes:
        table: the walk along held-out answers where it was measured, else tau by decoding.
        command: the same table from ``lkspec report``, which knows other formats and layouts.
    """

    table: Table
    command: str


def sweep_table(folders: Sequence[Path], overrides: Sequence[Sequence[str]]) -> SweepTable | None:
    """The table of finished jobs; None where fewer than two of them measured anything.

    Args:
        folders: of their runs.
        overrides: what each job was started with.

    Raises:
        ValueError: as ``build_table``.
    """
    runs = [run for run in map(RunFolder.open, dict.fromkeys(folders)) if run.is_finished]
    value = next((measure for measure in ("walk", "tau") if len(_measured(runs, measure)) > 1), None)
    if value is None:
        return None
    rows = _rows(overrides)
    columns = ["temperature"] if value == "walk" else ["temperature", "benchmark"]
    objectives = {one.get("objective") for one in read_series(runs, value)}
    baseline = _BASELINE if rows[-1] == "objective" and _BASELINE in objectives and len(objectives) > 1 else None
    table = build_table(runs, Layout(rows=rows, columns=columns, value=value, baseline=baseline))
    options = [f"rows=[{','.join(rows)}]", f"value={value}", f"columns=[{','.join(columns)}]"]
    told = [*options, *([] if baseline is None else [f"baseline={baseline}"])]
    return SweepTable(table, shlex.join(["lkspec", "report", f"runs={_pattern(folders)}", *told]))


def _measured(runs: Sequence[RunFolder], measure: str) -> set[str]:
    return {one.run.name for one in read_series(runs, measure)}


def _rows(overrides: Sequence[Sequence[str]]) -> list[str]:
    """Keys that jobs differ in, the objective last, which a baseline is one of; draft and objective where none do."""
    settings = [dict(text.lstrip("+~").partition("=")[::2] for text in job) for job in overrides]
    keys = dict.fromkeys(key for job in settings for key in job)
    differing = [key for key in keys if len({job.get(key) for job in settings}) > 1]
    wanted = [key for key in differing if key.split(".")[0].split("/")[0] not in _NOT_SETTINGS]
    others = [key for key in wanted if key.split(".")[0] != "loss"]
    objective = ["objective"] if len(others) < len(wanted) else []
    return [*others, *objective] or ["draft", "objective"]


def _pattern(folders: Sequence[Path]) -> str:
    """What ``runs=`` finds these by: their common folder where it holds no other run."""
    parents = {folder.parent for folder in folders}
    root = parents.pop()
    if not parents and {path.parent for path in root.glob("*/config.yaml")} == set(folders):
        return str(root / "*")
    return f"[{','.join(map(str, dict.fromkeys(folders)))}]"
