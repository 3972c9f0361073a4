"""Where a job stands, and how long it would take."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from lkspec.app import job as module
from lkspec.app.job import SECONDS, Job, State
from lkspec.app.sweeps import Sweep
from lkspec.runs.folder import RunFolder
from lkspec.runs.identity import Identity

IDENTITY = Identity("t", "d", {"a.py": "1"}, {"m.py": "1"})


@pytest.fixture
def run(tmp_path) -> RunFolder:
    config = {"names": {"draft": "mlp", "target": "tiny"}}
    return RunFolder.create(tmp_path, "mlp-kl-tiny-s0-00000000", config=config, overrides=[])


@pytest.fixture
def state(monkeypatch):
    """``state(folder, identity)``; without one, nothing may be read."""

    def of(folder: RunFolder, identity: Identity | None = None) -> tuple[State, list[str]]:
        def now(self: Job, sweep: Sweep) -> Identity:
            assert identity is not None, "the data were read although there is nothing to compare"
            return identity

        monkeypatch.setattr(Job, "identity", now)
        return Job(OmegaConf.create(), folder, ()).state(Sweep())

    return of


def test_the_states_of_a_folder(run, state):
    assert state(RunFolder(run.path.parent / "not-there")) == (State.TO_DO, [])
    assert state(run) == (State.TO_DO, [])
    run.write_failure("Traceback")
    assert state(run) == (State.FAILED, [])
    (run.checkpoints_dir / "step=5.ckpt").touch()
    assert state(run, IDENTITY) == (State.STALE, ["no identity was recorded"])
    run.write_identity(IDENTITY.as_dict())
    assert state(run, IDENTITY) == (State.FAILED, [])
    run.write_failure(None)
    assert state(run, IDENTITY) == (State.UNFINISHED, [])
    run.write_metrics({"x": 1.0})
    assert state(run, IDENTITY) == (State.DONE, [])
    assert state(run, Identity("t", "d", {"a.py": "9"}, {"m.py": "9"})) == (State.STALE, ["code a.py"])
    assert state(run, Identity("t", "d", {"a.py": "1"}, {"m.py": "9"})) == (State.DONE, ["code m.py"])


def test_a_stale_run_is_set_aside_where_reports_do_not_look(run, tmp_path):
    for number in (1, 2):
        assert RunFolder.create(tmp_path, run.name, config={}, overrides=[]).set_aside().name == f"{run.name}-{number}"
    assert sorted(path.name for path in tmp_path.glob("*/config.yaml")) == []
    assert len(list(tmp_path.glob("stale/*/config.yaml"))) == 2


def test_hours_are_those_of_finished_runs_of_the_same_draft_and_target(tmp_path, monkeypatch):
    seen = {
        "a": ("mlp", 4096, 100.0, 1000.0), "b": ("mlp", 4096, 300.0, 1000.0), "c": ("mlp", 4096, 90.0, 300.0),
        "d": ("mtp", None, 7.0, 1.0), "e": ("mlp", 64, 20.0, 1000.0), "f": ("mlp", 64, 20.0, 1000.0),
    }  # fmt: skip

    def config(draft: str, vocab: int | None) -> dict:
        names = {"draft": draft, "target": "tiny"}
        return {"names": names, "draft": {}, "target": {}, "vocab": {"size": vocab}, "states_dir": None}

    for name, (draft, vocab, seconds, tokens) in seen.items():
        folder = RunFolder.create(tmp_path, name, config=config(draft, vocab) | {"draft": draft}, overrides=[])
        folder.write_metrics({SECONDS: seconds, "train/supervised_tokens": tokens})
    RunFolder.create(tmp_path, "unfinished", config=config("mlp", 4096), overrides=[])

    def estimate(draft: str, vocab: int | None = 4096, *, epochs: int | None = None, steps: int = -1) -> float | None:
        data = SimpleNamespace(num_supervised_tokens=500, train_dataloader=lambda: range(10))  # 500 tokens in 10 steps
        monkeypatch.setattr(module, "target_and_data", lambda config, sweep: (None, data))
        trainer = {"max_epochs": epochs, "max_steps": steps}
        full = OmegaConf.create(config(draft, vocab) | {"draft": draft, "trainer": trainer})
        return Job(full, RunFolder(tmp_path / "new"), ())._estimated_seconds(Sweep())

    assert estimate("mlp", epochs=1) == pytest.approx(150.0)  # the median of 0.1, 0.3, 0.3 seconds per token
    assert estimate("mlp", epochs=2, steps=5) == pytest.approx(75.0)  # half an epoch comes first
    assert estimate("mlp", 64, epochs=1) == pytest.approx(10.0)
    assert estimate("mlp", 128, epochs=1) == pytest.approx(50.0)  # none is alike: of all with this draft
    assert estimate("mtp", None, steps=1) == pytest.approx(350.0)
    assert estimate("eagle3", epochs=1) is None
    assert estimate("mlp") is None, "nothing bounds it"
