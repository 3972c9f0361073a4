"""What identifies a job, and the states that its folder can be in."""

from __future__ import annotations

import copy
import json

import pytest

from lkspec.app import job as jobs
from lkspec.app.job import Identity, State, estimated_seconds, held, is_held, job_state, outcome_config
from lkspec.runs.folder import RunFolder
from lkspec.runs.rows import content_hash

CONFIG = {
    "seed": 0,
    "run_root": "runs",
    "run_dir": None,
    "resume": None,
    "on_existing": "error",
    "plan": False,
    "logger": {"tensorboard": {"save_dir": None}},
    "states_dir": None,
    "target": {"_target_": "T", "device": "auto", "dtype": "float32"},
    "trainer": {"accelerator": "auto", "devices": 1, "max_epochs": 4, "enable_progress_bar": True},
    "data": {"num_workers": 0, "max_tokens": 512},
    "callbacks": {"checkpoint": {"every": 50}, "progress": {}, "acceptance_length": {"every_n_epochs": 0}},
    "loss": {"_target_": "lkspec.losses.objectives.LKLambda", "eta": 3.0},
    "vocab": {"size": 4096},
}
IDENTITY = Identity("t", "d", {"a": "1", "b": "2"})


def job_hash(**changes) -> str:
    """The hash with dotted keys changed (``__`` for a dot)."""
    config = copy.deepcopy(CONFIG)
    for key, value in changes.items():
        *sections, last = key.split("__")
        inner = config
        for section in sections:
            inner = inner[section]
        inner[last] = value
    return content_hash(outcome_config(config))


@pytest.mark.parametrize(
    "changes",
    [
        {"run_root": "elsewhere"},
        {"run_dir": "runs/x"},
        {"on_existing": "continue"},
        {"plan": True},
        {"logger": {}},
        {"unroll": {"compile": True}},
        {"target__device": "cuda"},
        {"trainer__accelerator": "cpu"},
        {"trainer__devices": [3]},
        {"trainer__devices": "auto"},
        {"data__num_workers": 4},
        {"callbacks__checkpoint": {"every": 7}},
        {"loss__eta": 3},
    ],
    ids=str,
)
def test_paths_devices_and_loggers_are_not_part_of_a_job(changes):
    assert job_hash(**changes) == job_hash()


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"target__dtype": "bfloat16"},
        {"trainer__devices": 2},
        {"trainer__max_epochs": 5},
        {"data__max_tokens": 513},
        {"callbacks__acceptance_length": None},
        {"loss__eta": 3.5},
        {"states_dir": "captured/x"},
        {"vocab__size": None},
    ],
    ids=str,
)
def test_what_decides_the_outcome_is(changes):
    assert job_hash(**changes) != job_hash()


def test_where_a_capture_lies_is_not_and_several_devices_count_by_number():
    assert job_hash(states_dir="a") == job_hash(states_dir="b")
    assert job_hash(trainer__devices=[0, 1]) == job_hash(trainer__devices=2) == job_hash(trainer__devices=[2, 5])


def test_the_configuration_itself_is_left_alone():
    before = json.dumps(CONFIG)
    outcome_config(CONFIG)
    assert json.dumps(CONFIG) == before


def test_changes_are_named():
    other = Identity("t", "e", {"a": "1", "b": "3", "c": "4"})
    assert other.changes_since(IDENTITY.as_dict()) == ["data", "b", "c"]
    assert IDENTITY.changes_since(other.as_dict()) == ["data", "b", "c"]
    assert IDENTITY.changes_since(json.loads(json.dumps(IDENTITY.as_dict()))) == []
    assert IDENTITY.changes_since(None) == ["no identity was recorded"]


@pytest.fixture
def run(tmp_path) -> RunFolder:
    config = {"names": {"draft": "mlp", "target": "tiny"}}
    return RunFolder.create(tmp_path, "mlp-kl-tiny-s0-00000000", config=config, overrides=[])


def test_the_states_of_a_folder(run):
    def same():
        return IDENTITY

    def never():
        raise AssertionError("the data were read although there is nothing to compare")

    def other():
        return Identity("t", "d", {"a": "1", "b": "9"})

    assert job_state(RunFolder(run.path.parent / "not-there"), never) == (State.TO_DO, [])
    assert job_state(run, never) == (State.TO_DO, [])
    run.write_failure("Traceback")
    assert job_state(run, never) == (State.FAILED, [])
    run.write_identity(IDENTITY.as_dict())
    (run.checkpoints_dir / "step=5.ckpt").touch()
    assert job_state(run, same) == (State.FAILED, [])
    run.write_failure(None)
    assert job_state(run, same) == (State.UNFINISHED, [])
    run.write_metrics({"x": 1.0})
    assert job_state(run, same) == (State.DONE, [])
    assert job_state(run, other) == (State.STALE, ["b"])


def test_a_stale_run_is_set_aside_where_reports_do_not_look(run, tmp_path):
    for number in (1, 2):
        assert RunFolder.create(tmp_path, run.name, config={}, overrides=[]).set_aside().name == f"{run.name}-{number}"
    assert sorted(path.name for path in tmp_path.glob("*/config.yaml")) == []
    assert len(list(tmp_path.glob("stale/*/config.yaml"))) == 2


def test_a_name_is_held_by_one_at_a_time(tmp_path):
    assert not is_held(tmp_path, "x")
    assert not (tmp_path / ".locks").exists()
    with held(tmp_path, "x") as first:
        assert first
        assert is_held(tmp_path, "x")
        assert not is_held(tmp_path, "y")
        with held(tmp_path, "x") as second:
            assert not second
    with held(tmp_path, "x") as third:
        assert third


def test_hours_are_those_of_finished_runs_of_the_same_draft_and_target(tmp_path):
    jobs._seconds_per_token.cache_clear()
    seen = {
        "a": ("mlp", 4096, 100.0, 1000.0), "b": ("mlp", 4096, 300.0, 1000.0), "c": ("mlp", 4096, 90.0, 300.0),
        "d": ("mtp", None, 7.0, 1.0), "e": ("mlp", 64, 20.0, 1000.0), "f": ("mlp", 64, 20.0, 1000.0),
    }  # fmt: skip

    def config(draft: str, vocab: int | None) -> dict:
        names = {"draft": draft, "target": "tiny"}
        return {
            "names": names,
            "draft": {"_target_": draft},
            "target": {},
            "vocab": {"size": vocab},
            "states_dir": None,
        }

    for name, (draft, vocab, seconds, tokens) in seen.items():
        folder = RunFolder.create(tmp_path, name, config=config(draft, vocab), overrides=[])
        folder.write_metrics({jobs.SECONDS: seconds, "train/supervised_tokens": tokens})
    RunFolder.create(tmp_path, "unfinished", config=config("mlp", 4096), overrides=[])

    def estimate(draft: str, tokens: int | None, vocab: int | None = 4096) -> float | None:
        return estimated_seconds(tmp_path, config(draft, vocab), supervised_tokens=tokens)

    assert estimate("mlp", 500) == pytest.approx(150.0)  # the median of 0.1, 0.3, 0.3 seconds a token
    assert estimate("mlp", 500, vocab=64) == pytest.approx(10.0)
    assert estimate("mlp", 500, vocab=128) == pytest.approx(50.0)  # none is alike: of all with this draft
    assert estimate("mtp", 3, vocab=None) == pytest.approx(21.0)
    assert estimate("eagle3", 500) is None
    assert estimate("mlp", None) is None
    jobs._seconds_per_token.cache_clear()
