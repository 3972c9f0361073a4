"""What a sweep prints of its jobs: how they ended, what they measured, and the list that ``list_jobs=true`` asks for.

A job is an entry of the sweep's journal: ``overrides``, ``state``, and where they are known ``folder`` and ``error``.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lkspec.reporting.counts import read_series
from lkspec.reporting.layout import Layout
from lkspec.reporting.model import Table
from lkspec.reporting.renderers.text import show
from lkspec.reporting.tables import build_table
from lkspec.reporting.terminal import say, table
from lkspec.runs.folder import RunFolder
from lkspec.runs.keys import Kind, kind

Job = Mapping[str, Any]
_BASELINE = "kl"


def print_summary(jobs: Sequence[Job], *, interrupted: bool) -> None:
    """How many were trained, kept, failed or not finished, and what to do about the latter two."""
    failed = [job for job in jobs if job["state"] == "failed"]
    unfinished = [job for job in jobs if job["state"] != "failed" and not job.get("ended")]
    kept = [job for job in jobs if job.get("ended") and job["state"] in ("done", "running")]
    trained = len(jobs) - len(failed) - len(unfinished) - len(kept)
    counts = {"trained": trained, "kept": len(kept), "failed": len(failed), "not finished": len(unfinished)}
    say(f"{len(jobs)} jobs: {', '.join(f'{number} {name}' for name, number in counts.items() if number)}")
    if interrupted or unfinished:
        where = f" in {', '.join(map(_where, unfinished))}" if unfinished else ""
        say(f"stopped{where}: the same command continues there (on_existing=continue)")
    if failed:
        say(f"{len(failed)} of {len(jobs)} failed:")
        for job in failed:
            say(f"  {_where(job)}: {job['error']}")


def _where(job: Job) -> str:
    """Its folder, or the overrides of a job that was refused before it had one."""
    folder = job.get("folder")
    return folder if folder is not None and Path(folder).is_dir() else " ".join(job["overrides"])


def print_measured(jobs: Sequence[Job]) -> None:
    """What finished jobs measured, and the command that shows it in other ways."""
    try:
        found = sweep_table([Path(job["folder"]) for job in jobs], [job["overrides"] for job in jobs])
    except ValueError as error:
        say(f"no table of these jobs: {error}")
        return
    if found is not None:
        show(found[0])
        say("the same in other ways (format=png out=picture.png, say):")
        say(found[1])


def sweep_table(folders: Sequence[Path], overrides: Sequence[Sequence[str]]) -> tuple[Table, str] | None:
    """The table of finished jobs and the command that lays it out; None where fewer than two measured anything.

    It shows the walk along held-out answers where that was measured, else tau by decoding, by what jobs differ in.

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
    found = build_table(runs, Layout(rows=rows, columns=columns, value=value, baseline=baseline))
    options = [f"rows=[{','.join(rows)}]", f"value={value}", f"columns=[{','.join(columns)}]"]
    told = [*options, *([] if baseline is None else [f"baseline={baseline}"])]
    return found, shlex.join(["lkspec", "report", f"runs={_pattern(folders)}", *told])


def _measured(runs: Sequence[RunFolder], measure: str) -> set[str]:
    return {one.run.name for one in read_series(runs, measure)}


def _rows(overrides: Sequence[Sequence[str]]) -> list[str]:
    """Keys that jobs differ in, the objective last, which a baseline is one of; draft and objective where none do."""
    settings = [dict(text.lstrip("+~").partition("=")[::2] for text in job) for job in overrides]
    keys = dict.fromkeys(key for job in settings for key in job)
    differing = [key for key in keys if len({job.get(key) for job in settings}) > 1]
    wanted = [key for key in differing if key != "seed" and kind(key) != Kind.OUTPUT]  # means are over seeds
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


def print_list(jobs: Sequence[Job]) -> None:
    """Jobs by state, with what has changed since and the estimated hours, and their sums.

    Each has ``folder``, ``state``, ``changes`` and ``seconds`` (None: not known).
    """
    left = [job for job in jobs if job["state"] not in ("done", "running")]
    rows = []
    for job in jobs:
        hours = "" if job not in left else "unknown" if job["seconds"] is None else f"{job['seconds'] / 3600:.2f}"
        rows.append((Path(job["folder"]).name, job["state"], ", ".join(job["changes"]), hours))
    table("nothing was run", ("job", "state", "changed since", "hours"), rows, left=("job", "state", "changed since"))
    known = [job["seconds"] for job in left if job["seconds"] is not None]
    total = f"{sum(known) / 3600:.2f} hours one after another" if known else "hours unknown" if left else "none left"
    if known and len(known) < len(left):
        total += f", without {len(left) - len(known)} of unknown length"
    counts = Counter(str(job["state"]) for job in jobs)
    say(f"{', '.join(f'{number} {state}' for state, number in counts.items())}; {total}")
