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
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, open_dict

from lkspec.app.gpu_pool import take_device, visible_devices

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
        with suppress(OSError):  # not empty
            sweep.journal.parent.rmdir()
    if jobs:
        from lkspec.reporting import jobs as printed  # pandas and all: nothing that a job should wait for

        listed = [job | job["listed"] for job in jobs if "listed" in job]
        measured = [job for job in listed if job["state"] == "done"]
        if listed:
            printed.print_list(listed)
        else:
            printed.print_summary(jobs, interrupted=interrupted)
            measured = [job for job in jobs if job.get("ended") and "folder" in job]
        if not sweep.keep:  # whoever keeps the journal compares the runs in a way of its own
            printed.print_measured(measured)
    return 0 if all(job.get("ended") for job in jobs) else 1


def read_journal(journal: Path) -> list[dict[str, Any]]:
    """One entry per job, later lines over earlier ones: ``folder``, ``state``, ``overrides``, ``error``."""
    jobs: dict[int, dict[str, Any]] = {}
    for line in journal.read_text().splitlines():
        entry = json.loads(line)
        jobs.setdefault(entry["job"], {}).update(entry)
    return [jobs[number] for number in sorted(jobs)]
