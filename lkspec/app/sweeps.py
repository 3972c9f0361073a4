"""Sweeps: a failed job does not stop the others, and at the end it is said which failed, were kept, or are left.

Hydra's launchers run all jobs of a sweep and raise the first error afterwards, without the folders of the others, and
a job that exits takes the sweep with it. So a job's error is caught here, where the job runs, and noted in a journal:
a file, because a launcher may run jobs in other processes or on other machines. Only an interrupt (Ctrl-C) ends a
sweep; the same command goes on where it stopped.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from lkspec.app.gpu_pool import take_device, visible_devices
from lkspec.reporting.terminal import console, say, table

_JOURNAL = "LKSPEC_SWEEP"  # where the journal of the sweep under way is
KEPT_JOURNAL = "LKSPEC_SWEEP_JOURNAL"  # where a caller wants to find it afterwards
_POOL = "LKSPEC_GPU_POOL"  # devices of which each process takes one
_PLUGINS = {"joblib": "joblib", "submitit_local": "submitit", "submitit_slurm": "submitit"}

Made = TypeVar("Made")
_shared: dict[str, tuple[str, Any]] = {}


class SweepCallback(Callback):
    """Opens the journal of a multirun and the pool of GPUs, after refusing what cannot work."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        try:
            _check(config)
        except ValueError as error:  # as an exit: Hydra turns a callback's exceptions into warnings
            print(f"Error: {error}", file=sys.stderr)
            sys.exit(2)
        root = Path(config.run_root)
        root.mkdir(parents=True, exist_ok=True)
        journal = Path(os.environ.get(KEPT_JOURNAL, root.absolute() / f".sweep-{os.getpid()}.jsonl"))
        journal.write_text("")
        os.environ[_JOURNAL] = str(journal)


def _check(config: DictConfig) -> None:
    launcher = config.hydra.runtime.choices["hydra/launcher"]
    plugin = _PLUGINS.get(launcher)
    if plugin is not None and find_spec(f"hydra_plugins.hydra_{plugin}_launcher") is None:
        raise ValueError(f"hydra/launcher={launcher} needs a plugin: pip install 'lkspec[sweeps]'")
    refuse_parallel_jobs(config.trainer.devices)
    if launcher == "joblib" and (devices := visible_devices()):
        if not 1 <= config.hydra.launcher.n_jobs <= len(devices):
            raise ValueError(
                f"hydra.launcher.n_jobs={config.hydra.launcher.n_jobs}: each of these jobs takes a GPU of its own, and "
                f"there are {len(devices)} ({', '.join(devices)}); set it to between 1 and {len(devices)}"
            )
        os.environ[_POOL] = ",".join(devices)


def refuse_parallel_jobs(devices: Any) -> None:
    """Every rank of a multi-device run starts the whole program again, a sweep included.

    Raises:
        ValueError: more than one device.
    """
    if devices not in (1, "1", [0]):
        raise ValueError(
            f"a multirun with trainer.devices={devices} would start the whole sweep again in each "
            "process: sweep with trainer.devices=1, or start the runs one by one"
        )


def is_job() -> bool:
    """Whether this is a job of a sweep."""
    return HydraConfig.get().mode == RunMode.MULTIRUN and _JOURNAL in os.environ


def shared(kind: str, key: Any, make: Callable[[], Made]) -> Made:
    """What an earlier job of this sweep made in this process for the same key, or else what ``make`` makes.

    Loading the frozen target, tokenising the data and computing the target's states may take longer than a training.
    One object of each kind is kept, to the end of the sweep; outside sweeps nothing is.

    Args:
        kind: of thing.
        key: plain data, everything that the object depends on.
        make: makes it; the last one of its kind is let go before.
    """
    if not is_job():
        return make()
    marker = json.dumps([os.environ[_JOURNAL], key], sort_keys=True)
    known = _shared.get(kind)
    if known is None or known[0] != marker:
        _shared.pop(kind, None)
        known = _shared[kind] = (marker, make())
    return known[1]


def note(**facts: Any) -> None:
    """Adds to the journal what is known of the present job; nothing outside sweeps."""
    if not is_job():
        return
    line = {"job": HydraConfig.get().job.num, "overrides": list(HydraConfig.get().overrides.task), **facts}
    with Path(os.environ[_JOURNAL]).open("a") as file:
        file.write(json.dumps(line) + "\n")


def plan(line: dict[str, Any]) -> None:
    """Takes a line of ``plan=true``; prints it at once outside sweeps, where it is the only one."""
    if is_job():
        note(plan=line)
    else:
        print_plan([line])


def run_job(job: Callable[[], Any], explain: Callable[[Exception], str | None]) -> Any:
    """Runs a job of a sweep on a device of its own; its error is noted, not raised.

    Args:
        job: the training.
        explain: one line about a user's mistake; None for other errors, whose stack trace is printed.
    """
    note(state="started")
    try:
        if _POOL in os.environ:
            note(device=take_device(os.environ[_POOL].split(",")))
        result = job()
    except Exception as error:
        text = explain(error)
        if text is None:
            traceback.print_exc()
        print(f"Error: {text or error}", file=sys.stderr)
        note(state="failed", error=text or f"{type(error).__name__}: {error}")
        return None
    finally:
        gc.collect()  # the trainer's cycles hold the draft and the optimiser of the job before
    note(ended=True)
    return result


def finish(*, interrupted: bool) -> int:
    """Says how a sweep ended and closes its journal; returns the exit status, 0 without a sweep."""
    journal = os.environ.pop(_JOURNAL, None)
    os.environ.pop(_POOL, None)
    _shared.clear()
    if journal is None:
        return 0
    jobs = read_journal(Path(journal))
    if journal != os.environ.get(KEPT_JOURNAL):
        Path(journal).unlink()
    if not jobs:  # what was typed is not even a sweep
        return 0
    if plans := [job for job in jobs if "plan" in job]:
        print_plan([job["plan"] for job in plans])
        done = [job for job in plans if job["plan"]["state"] == "done"]
        _print_table([job["plan"]["folder"] for job in done], [job["overrides"] for job in done])
        return 1 if any(job.get("state") == "failed" for job in jobs) else 0
    status = _summarise(jobs, interrupted=interrupted)
    if KEPT_JOURNAL not in os.environ:  # whoever keeps the journal compares the runs in a way of its own
        ended = [job for job in jobs if job.get("ended") and "folder" in job and job["state"] != "failed"]
        _print_table([job["folder"] for job in ended], [job["overrides"] for job in ended])
    return status


def read_journal(journal: Path) -> list[dict[str, Any]]:
    """One entry a job, later lines over earlier ones: ``folder``, ``state``, ``overrides``, ``error``."""
    jobs: dict[int, dict[str, Any]] = {}
    for line in journal.read_text().splitlines():
        entry = json.loads(line)
        jobs.setdefault(entry["job"], {}).update(entry)
    return [jobs[number] for number in sorted(jobs)]


def _summarise(jobs: Sequence[dict[str, Any]], *, interrupted: bool) -> int:
    failed = [job for job in jobs if job["state"] == "failed"]
    open_ = [job for job in jobs if job["state"] != "failed" and not job.get("ended")]
    kept = [job for job in jobs if job.get("ended") and job["state"] in ("done", "running")]
    trained = len(jobs) - len(failed) - len(open_) - len(kept)
    counts = {"trained": trained, "kept": len(kept), "failed": len(failed), "not finished": len(open_)}
    shown = ", ".join(f"{number} {name}" for name, number in counts.items() if number)
    console.print(f"{len(jobs)} jobs: {shown or 'none started'}", highlight=False)
    if interrupted or open_:
        where = f" in {', '.join(_where(job) for job in open_)}" if open_ else ""
        console.print(f"stopped{where}: the same command goes on there (on_existing=continue)", soft_wrap=True)
    if failed:
        console.print(f"{len(failed)} of {len(jobs)} failed:", highlight=False)
        for job in failed:
            say(f"  {_where(job)}: {job['error']}")
    return 1 if failed or open_ else 0


def _print_table(folders: Sequence[str], overrides: Sequence[Sequence[str]]) -> None:
    """What the finished jobs measured, and the command that shows it in other ways."""
    from lkspec.reporting.of_sweep import sweep_table  # pandas and all: nothing that a job should wait for
    from lkspec.reporting.renderers import rich_table

    try:
        found = sweep_table([Path(folder) for folder in folders], overrides)
    except ValueError as error:
        say(f"no table of these jobs: {error}")
        return
    if found is not None:
        rich_table.show(found.table)
        console.print("the same in other ways (format=png out=picture.png, say):", highlight=False)
        say(found.command)


def _where(job: dict[str, Any]) -> str:
    return job.get("folder") or " ".join(job["overrides"])


def print_plan(lines: Sequence[dict[str, Any]]) -> None:
    """The table of ``plan=true``: jobs by state, with estimated hours, and their sums."""
    rows = []
    for line in lines:
        is_left = line["state"] not in ("done", "running")
        hours = "" if not is_left else "unknown" if line["seconds"] is None else f"{line['seconds'] / 3600:.2f}"
        rows.append([Path(line["folder"]).name, line["state"], ", ".join(line["changes"]), hours])
    names = ("job", "state", "changed since")
    table("nothing was run", (*names, "hours"), rows, left=names)
    counts = Counter(str(line["state"]) for line in lines)
    known = [line["seconds"] for line in lines if line["seconds"] is not None]
    left = [line for line in lines if line["state"] not in ("done", "running")]
    total = f"{sum(known) / 3600:.2f} hours one after another" if known else "hours unknown" if left else "none left"
    if known and len(known) < len(left):
        total += f", without {len(left) - len(known)} of unknown length"
    console.print(f"{', '.join(f'{number} {state}' for state, number in counts.items())}; {total}", highlight=False)
