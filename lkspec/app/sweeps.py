"""Sweeps: a failed job does not stop the others, and at the end it is said which failed, were kept, or are left.

Hydra's launchers run all jobs of a sweep and raise the first error afterwards, without the folders of the others, and
a job that exits takes the sweep with it. So a job's error is caught where the job runs and noted in a journal: a file,
because a launcher may run jobs in other processes or on other machines; each job is told it as ``journal=<path>``. Only
an interrupt (Ctrl-C) ends a sweep; the same command continues where it stopped.
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
from omegaconf import DictConfig, open_dict

from lkspec.app.gpu_pool import take_device, visible_devices
from lkspec.reporting.terminal import say, table

_PLUGINS = {"joblib": "joblib", "submitit_local": "submitit", "submitit_slurm": "submitit"}

Made = TypeVar("Made")
_present: Sweep | None = None  # the one that this process started, or runs a job of


class Sweep:
    """What jobs that run in one process share: objects made once, and the journal. A run by itself is a sweep of one.

    Args:
        journal: where jobs note how they stand; None for a run by itself.
        keep: whether the journal stays: whoever named it reads it afterwards.
    """

    def __init__(self, journal: Path | None = None, *, keep: bool = False) -> None:
        self.journal, self.keep = journal, keep
        self._made: dict[str, tuple[str, Any]] = {}

    @classmethod
    def of(cls, config: DictConfig) -> Sweep:
        """The sweep that a job's configuration names; jobs of one process get the same object."""
        global _present
        journal = None if config.journal is None else Path(config.journal)
        if journal is None:
            return cls()
        if _present is None or _present.journal != journal:
            _present = cls(journal)
        return _present

    def once(self, kind: str, key: Any, make: Callable[[], Made]) -> Made:
        """What was made for the same key before, or else what ``make`` makes.

        Loading the target, tokenising the data and computing the target's states may take longer than a training. One
        object of each kind is kept; the last one is let go before the next is made.

        Args:
            kind: of object.
            key: plain data, everything that the object depends on.
            make: makes it.
        """
        text = json.dumps(key, sort_keys=True)
        if kind not in self._made or self._made[kind][0] != text:
            self._made.pop(kind, None)
            self._made[kind] = (text, make())
        return self._made[kind][1]

    def note(self, **facts: Any) -> None:
        """Adds to the journal what is known of the present job."""
        if self.journal is not None:
            line = {"job": HydraConfig.get().job.num, "overrides": typed_overrides(), **facts}
            with self.journal.open("a") as file:
                file.write(json.dumps(line) + "\n")

    def list_job(self, line: dict[str, Any]) -> None:
        """Takes a line of ``list_jobs=true``; a run by itself prints it at once."""
        if self.journal is None:
            print_jobs([line])
        self.note(listed=line)

    def run_job(self, job: Callable[[], Any], explain: Callable[[Exception], str | None]) -> Any:
        """Runs a job on a device of its own; its error is noted, not raised.

        Args:
            job: the training.
            explain: one line about a user's mistake; None for other errors, whose stack trace is printed.
        """
        self.note(state="started")
        try:
            if HydraConfig.get().runtime.choices["hydra/launcher"] == "joblib" and (devices := visible_devices()):
                self.note(device=take_device(devices))
            result = job()
        except Exception as error:
            text = explain(error)
            if text is None:
                traceback.print_exc()
            print(f"Error: {text or error}", file=sys.stderr)
            self.note(state="failed", error=text or f"{type(error).__name__}: {error}")
            return None
        finally:
            gc.collect()  # the trainer's cycles hold the draft and the optimiser of the job before
        self.note(ended=True)
        return result


def typed_overrides() -> list[str]:
    """The overrides of the present job as its user typed them."""
    return [text for text in HydraConfig.get().overrides.task if not text.startswith("journal=")]


class SweepCallback(Callback):
    """Opens the journal of a multirun and tells it to the jobs, after refusing what cannot work."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        global _present
        try:
            _check(config)
        except ValueError as error:  # as an exit: Hydra turns a callback's exceptions into warnings
            print(f"Error: {error}", file=sys.stderr)
            sys.exit(2)
        root = Path(config.run_root)
        journal = Path(config.journal or root.absolute() / f".sweep-{os.getpid()}.jsonl")
        journal.parent.mkdir(parents=True, exist_ok=True)
        journal.write_text("")
        _present = Sweep(journal, keep=config.journal is not None)
        if config.journal is None:
            with open_dict(config.hydra.overrides):
                config.hydra.overrides.task.append("journal='{}'".format(str(journal).replace("'", "\\'")))


def _check(config: DictConfig) -> None:
    launcher = config.hydra.runtime.choices["hydra/launcher"]
    plugin = _PLUGINS.get(launcher)
    if plugin is not None and find_spec(f"hydra_plugins.hydra_{plugin}_launcher") is None:
        raise ValueError(f"hydra/launcher={launcher} needs a plugin: pip install 'lkspec[sweeps]'")
    refuse_parallel_jobs(config.trainer.devices)
    devices = visible_devices() if launcher == "joblib" else []
    if devices and not 1 <= config.hydra.launcher.n_jobs <= len(devices):
        raise ValueError(
            f"hydra.launcher.n_jobs={config.hydra.launcher.n_jobs}: each of these jobs takes a GPU of its own, and "
            f"there are {len(devices)} ({', '.join(devices)}); set it to between 1 and {len(devices)}"
        )


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


def finish(*, interrupted: bool) -> int:
    """Says how the sweep ended that this process started; returns the exit status, 0 where there was none."""
    global _present
    sweep, _present = _present, None
    if sweep is None or sweep.journal is None:
        return 0
    jobs = read_journal(sweep.journal)
    if not sweep.keep:
        sweep.journal.unlink()
        if not any(sweep.journal.parent.iterdir()):
            sweep.journal.parent.rmdir()
    if not jobs:  # what was typed is not even a sweep
        return 0
    if listed := [job for job in jobs if "listed" in job]:
        print_jobs([job["listed"] for job in listed])
        done = [job for job in listed if job["listed"]["state"] == "done"]
        _print_table([job["listed"]["folder"] for job in done], [job["overrides"] for job in done])
        return 1 if any(job.get("state") == "failed" for job in jobs) else 0
    if not sweep.keep:  # whoever keeps the journal compares the runs in a way of its own
        _print_summary(jobs, interrupted=interrupted)
        ended = [job for job in jobs if job.get("ended") and "folder" in job]
        _print_table([job["folder"] for job in ended], [job["overrides"] for job in ended])
    return 0 if all(job.get("ended") for job in jobs) else 1


def read_journal(journal: Path) -> list[dict[str, Any]]:
    """One entry per job, later lines over earlier ones: ``folder``, ``state``, ``overrides``, ``error``."""
    jobs: dict[int, dict[str, Any]] = {}
    for line in journal.read_text().splitlines():
        entry = json.loads(line)
        jobs.setdefault(entry["job"], {}).update(entry)
    return [jobs[number] for number in sorted(jobs)]


def _print_summary(jobs: Sequence[dict[str, Any]], *, interrupted: bool) -> None:
    failed = [job for job in jobs if job["state"] == "failed"]
    unfinished = [job for job in jobs if job["state"] != "failed" and not job.get("ended")]
    kept = [job for job in jobs if job.get("ended") and job["state"] in ("done", "running")]
    trained = len(jobs) - len(failed) - len(unfinished) - len(kept)
    counts = {"trained": trained, "kept": len(kept), "failed": len(failed), "not finished": len(unfinished)}
    say(f"{len(jobs)} jobs: {', '.join(f'{number} {name}' for name, number in counts.items() if number)}")
    if interrupted or unfinished:
        where = f" in {', '.join(_where(job) for job in unfinished)}" if unfinished else ""
        say(f"stopped{where}: the same command continues there (on_existing=continue)")
    if failed:
        say(f"{len(failed)} of {len(jobs)} failed:")
        for job in failed:
            say(f"  {_where(job)}: {job['error']}")


def _where(job: dict[str, Any]) -> str:
    """Its folder, or the overrides of a job that was refused before it had one."""
    folder = job.get("folder")
    return folder if folder is not None and Path(folder).is_dir() else " ".join(job["overrides"])


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
        say("the same in other ways (format=png out=picture.png, say):")
        say(found.command)


def print_jobs(lines: Sequence[dict[str, Any]]) -> None:
    """The table of ``list_jobs=true``: jobs by state, with estimated hours, and their sums."""
    rows = []
    for line in lines:
        hours = "" if _is_settled(line) else "unknown" if line["seconds"] is None else f"{line['seconds'] / 3600:.2f}"
        rows.append((Path(line["folder"]).name, line["state"], ", ".join(line["changes"]), hours))
    table("nothing was run", ("job", "state", "changed since", "hours"), rows, left=("job", "state", "changed since"))
    counts = Counter(str(line["state"]) for line in lines)
    known = [line["seconds"] for line in lines if line["seconds"] is not None]
    left = [line for line in lines if not _is_settled(line)]
    total = f"{sum(known) / 3600:.2f} hours one after another" if known else "hours unknown" if left else "none left"
    if known and len(known) < len(left):
        total += f", without {len(left) - len(known)} of unknown length"
    say(f"{', '.join(f'{number} {state}' for state, number in counts.items())}; {total}")


def _is_settled(line: dict[str, Any]) -> bool:
    return line["state"] in ("done", "running")
