"""What jobs of a sweep share, the journal they write, and how a sweep ends."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from lkspec.app import sweeps
from lkspec.app.sweeps import Sweep, SweepCallback, finish, read_journal, refuse_parallel_jobs


@pytest.fixture(autouse=True)
def no_sweep(monkeypatch):
    monkeypatch.setattr(sweeps, "_present", None)


@pytest.fixture
def as_job(monkeypatch):
    """``as_job(number, *overrides)``: Hydra runs this job now."""

    def set_job(number: int, *overrides: str) -> None:
        now = {
            "job": {"num": number},
            "overrides": {"task": [*overrides, "journal=here"]},
            "runtime": {"choices": {"hydra/launcher": "basic"}},
        }
        monkeypatch.setattr(HydraConfig, "get", lambda: OmegaConf.create(now))

    return set_job


def test_one_object_of_each_kind_is_kept_for_equal_keys():
    sweep, made = Sweep(), []

    def make(kind: str, key: object) -> object:
        return sweep.once(kind, key, lambda: made.append((kind, key)) or SimpleNamespace())

    first = make("target", {"a": 1, "b": 2})
    assert make("target", {"b": 2, "a": 1}) is first
    assert make("data", {"a": 1, "b": 2}) is not first
    assert make("target", {"a": 2}) is not first
    assert make("target", {"a": 1, "b": 2}) is not first, "the first one was let go"
    assert len(made) == 4


def test_jobs_of_one_journal_share_a_sweep_and_a_run_by_itself_has_its_own(tmp_path):
    of_sweep, alone = (OmegaConf.create({"journal": journal}) for journal in (str(tmp_path / "j"), None))
    assert Sweep.of(of_sweep) is Sweep.of(of_sweep)
    assert Sweep.of(alone) is not Sweep.of(alone)
    assert Sweep.of(alone).journal is None


def test_a_failed_job_is_noted_and_the_next_one_runs(tmp_path, as_job, capsys):
    sweep = Sweep(tmp_path / "journal")

    def fail():
        raise ValueError("lr: expected a positive number")

    as_job(0, "lr=-1")
    assert sweep.run_job(fail, str) is None
    as_job(1, "lr=1")
    assert sweep.run_job(lambda: sweep.note(folder="runs/b") or "done", str) == "done"
    failed, ended = read_journal(sweep.journal)
    assert failed == {
        "job": 0, "overrides": ["lr=-1"], "state": "failed", "error": "lr: expected a positive number"
    }  # fmt: skip
    assert (ended["overrides"], ended["folder"], ended["ended"]) == (["lr=1"], "runs/b", True)
    captured = capsys.readouterr()
    assert captured.err == "Error: lr: expected a positive number\n"
    as_job(2)
    sweep.run_job(fail, lambda error: None)
    assert "Traceback" in capsys.readouterr().err, "an error that is no user's mistake shows where it came from"


def test_entries_of_a_job_are_joined_the_later_over_the_earlier(tmp_path):
    lines = [{"job": 1, "state": "started"}, {"job": 0, "state": "done"}, {"job": 1, "state": "failed", "error": "e"}]
    (tmp_path / "journal").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_journal(tmp_path / "journal") == [
        {"job": 0, "state": "done"},
        {"job": 1, "state": "failed", "error": "e"},
    ]


def sweep_config(tmp_path, **changes) -> object:
    settings = {
        "run_root": str(tmp_path / "runs"),
        "journal": None,
        "trainer": {"devices": 1},
        "hydra": {
            "runtime": {"choices": {"hydra/launcher": "basic"}},
            "overrides": {"task": ["seed=0,1"]},
            "launcher": {"n_jobs": 2},
        },
    }
    return OmegaConf.merge(settings, changes)


def test_a_multirun_tells_its_jobs_the_journal_and_leaves_nothing_behind(tmp_path):
    config = sweep_config(tmp_path)
    SweepCallback().on_multirun_start(config)
    typed, told = config.hydra.overrides.task
    assert typed == "seed=0,1"
    journal = told.removeprefix("journal=").strip("'")
    assert read_journal(sweeps.Path(journal)) == []
    assert Sweep.of(OmegaConf.create({"journal": journal})) is sweeps._present
    assert finish(interrupted=False) == 0
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("ended", "status"), [(True, 0), (False, 1)])
def test_a_journal_that_was_named_stays_and_the_status_says_whether_all_jobs_ended(tmp_path, ended, status):
    named = tmp_path / "journal.jsonl"
    SweepCallback().on_multirun_start(sweep_config(tmp_path, journal=str(named)))
    line = {"job": 0, "overrides": ["seed=1"], "state": "started", "ended": ended}
    named.write_text(json.dumps(line) + "\n")
    assert finish(interrupted=False) == status
    assert named.is_file()
    assert finish(interrupted=False) == 0, "that sweep is over"


@pytest.mark.parametrize(
    ("changes", "devices", "told"),
    [
        ({"trainer": {"devices": 2}}, "", "trainer.devices=1"),
        (
            {"hydra": {"runtime": {"choices": {"hydra/launcher": "joblib"}}, "launcher": {"n_jobs": 3}}},
            "a,b",
            "1 and 2",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_any_job(tmp_path, monkeypatch, capsys, changes, devices, told):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", devices)
    with pytest.raises(SystemExit) as stopped:
        SweepCallback().on_multirun_start(sweep_config(tmp_path, **changes))
    assert stopped.value.code == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("devices", [1, "1", [0]])
def test_one_device_may_be_written_in_three_ways(devices):
    refuse_parallel_jobs(devices)
