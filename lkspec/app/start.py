"""Decides whether to start, resume or skip a run."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from lkspec.app.job import Job, State
from lkspec.app.sweeps import Sweep
from lkspec.reporting.terminal import say
from lkspec.runs.lock import held
from lkspec.training.run import is_first_rank


@contextmanager
def started(job: Job, sweep: Sweep) -> Iterator[Job | None]:
    """The job as it is to run, its folder held against other processes; None where there is nothing to do.

    An error that comes after the folder was made is written there, as failure.txt.

    Raises:
        ValueError: the folder holds an earlier run (``on_existing=error``).
    """
    if not is_first_rank():
        yield job  # the first rank has decided
        return
    with held(job.folder.path) as free:
        if not free:
            _say(job, sweep, State.RUNNING, "in use by another process")
            yield None
            return
        decided = _decided(job, sweep)
        if decided is not None:
            sweep.note(folder=str(job.folder.path))
            job.folder.write_failure(None)
        try:
            yield decided
        except Exception:
            if job.folder.path.is_dir():
                job.folder.write_failure(traceback.format_exc())
            raise


def _decided(job: Job, sweep: Sweep) -> Job | None:
    folder, on_existing = job.folder, job.config.on_existing
    if job.checkpoint is not None:  # resume=
        return job
    if on_existing == "continue":
        return _continued(job, sweep)
    if on_existing == "skip" and folder.is_finished:
        _say(job, sweep, State.DONE, "skipped (on_existing=skip)")
        return None
    if on_existing == "replace" and folder.has_results:
        folder.remove()
    folder.refuse_results()
    return job


def _continued(job: Job, sweep: Sweep) -> Job | None:
    """``on_existing=continue``: keeps what is done, continues the unfinished, begins the stale anew."""
    if job.config.trainer.devices not in (1, "1", "auto", [0]):
        raise ValueError(
            "on_existing=continue is for jobs of one device: the other processes would not know what the first one "
            "decided; continue a run of several devices with resume=..."
        )
    state, changes = job.state(sweep)
    if state == State.DONE:
        again = (
            f"; measured before {', '.join(changes)} changed: `lkspec evaluate run={job.folder.path}` renews its rows"
        )
        _say(job, sweep, state, f"kept{again if changes else ''}")
        return None
    if state == State.STALE:
        _say(job, sweep, state, f"{', '.join(changes)}; the old run is {job.folder.set_aside()}")
    elif (checkpoint := job.folder.last_checkpoint) is not None:
        _say(job, sweep, state, f"continues from {checkpoint.name}")
        return job.continued()
    return job


def _say(job: Job, sweep: Sweep, state: State, text: str) -> None:
    sweep.note(folder=str(job.folder.path), state=state)
    say(f"{job.folder.path} {state}: {text}")
