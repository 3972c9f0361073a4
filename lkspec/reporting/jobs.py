"""What a sweep prints of its jobs: how they ended, what they measured, and the list that ``list_jobs=true`` asks for.

A job is an entry of the sweep's journal: ``overrides``, ``state``, and where they are known ``folder`` and ``error``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lkspec.reporting.of_sweep import sweep_table
from lkspec.reporting.renderers.text import show
from lkspec.reporting.terminal import say, table

Job = Mapping[str, Any]


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
        show(found.table)
        say("the same in other ways (format=png out=picture.png, say):")
        say(found.command)


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
