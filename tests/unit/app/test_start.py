"""Whether a job begins, goes on or is left alone, by the folder that it finds."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from lkspec.app.job import Job, State
from lkspec.app.start import started
from lkspec.app.sweeps import Sweep
from lkspec.runs.folder import RunFolder
from lkspec.runs.lock import held

NAME = "mlp-kl-tiny-s0-00000000"


@pytest.fixture
def job(tmp_path) -> Job:
    """A job whose folder is not there."""
    return Job(OmegaConf.create({"on_existing": "error", "trainer": {"devices": 1}}), RunFolder(tmp_path / NAME), ())


def told(job: Job, on_existing: str) -> Job:
    return Job(OmegaConf.merge(job.config, {"on_existing": on_existing}), job.folder, ())


def trained(job: Job, *, finished: bool = True) -> RunFolder:
    """Its folder with a checkpoint, as training leaves it."""
    settings = {"on_existing": "continue", "trainer": {"devices": 1}}
    run = RunFolder.create(job.folder.path.parent, job.folder.name, config=settings, overrides=[])
    (run.checkpoints_dir / "step=3.ckpt").touch()
    if finished:
        run.write_metrics({"train/loss": 1.0})
    return run


def decided(job: Job) -> Job | None:
    with started(job, Sweep()) as found:
        return found


@pytest.mark.parametrize("on_existing", ["error", "skip", "replace", "continue"])
def test_where_nothing_is_there_a_job_begins(job, on_existing):
    asked = told(job, on_existing)
    assert decided(asked) is asked
    assert not job.folder.path.exists(), "the training makes it"


def test_what_is_there_is_refused_kept_or_replaced(job):
    trained(job)
    with pytest.raises(ValueError, match=f"resume={NAME}"):
        decided(told(job, "error"))
    assert decided(told(job, "skip")) is None
    assert job.folder.is_finished
    replaced = told(job, "replace")
    assert decided(replaced) is replaced
    assert not job.folder.has_results


def test_an_unfinished_run_is_not_skipped(job):
    trained(job, finished=False)
    with pytest.raises(ValueError, match=f"resume={NAME}"):
        decided(told(job, "skip"))


@pytest.mark.parametrize(
    ("state", "changes", "says"),
    [
        (State.DONE, [], "kept"),
        (State.DONE, ["code decoding/chain.py"], "lkspec evaluate run="),
        (State.STALE, ["data"], "data; the old run is "),
        (State.UNFINISHED, [], "continues from step=3.ckpt"),
    ],
)
def test_continue_follows_the_state(job, monkeypatch, capsys, state, changes, says):
    run = trained(job, finished=state != State.UNFINISHED)
    monkeypatch.setattr(Job, "state", lambda self, sweep: (state, changes))
    asked = told(job, "continue")
    found = decided(asked)
    assert says in " ".join(capsys.readouterr().out.split())
    if state == State.DONE:
        assert found is None
    elif state == State.STALE:
        assert found is asked
        assert not run.path.exists()
        assert (run.path.parent / "stale" / f"{NAME}-1").is_dir()
    else:
        assert found.checkpoint == run.last_checkpoint


def test_continue_is_for_one_device(job):
    trained(job)
    several = Job(OmegaConf.merge(job.config, {"on_existing": "continue", "trainer": {"devices": 2}}), job.folder, ())
    with pytest.raises(ValueError, match="resume="):
        decided(several)


def test_a_folder_that_another_process_holds_is_left_to_it(job, capsys):
    trained(job, finished=False)
    with held(job.folder.path) as free:
        assert free
        assert decided(told(job, "replace")) is None
    assert "in use by another process" in " ".join(capsys.readouterr().out.split())
    assert job.folder.last_checkpoint is not None


def fail(job: Job, *, made: bool) -> None:
    with started(job, Sweep()):
        if made:
            RunFolder.create(job.folder.path.parent, NAME, config={}, overrides=[])
        raise RuntimeError("no memory")


def test_an_error_is_written_into_the_folder_that_was_made(job):
    with pytest.raises(RuntimeError, match="no memory"):
        fail(job, made=False)
    assert not job.folder.path.exists()
    with pytest.raises(RuntimeError, match="no memory"):
        fail(job, made=True)
    assert job.folder.has_failed
    with started(job, Sweep()):
        assert not job.folder.has_failed, "the next attempt begins"
