"""A run that was killed goes on as if nothing had happened."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from command_line import (
    BRIEF_EVALUATION,
    NO_EVALUATION,
    TINY_RUN,
    assert_same_training,
    logged,
    only_run,
    subprocess_cli,
    weights,
)

# 3 epochs of 4 steps.
RUN = (*TINY_RUN, *NO_EVALUATION, "trainer.max_epochs=3", "trainer.max_steps=-1", "logger=csv")

KILL_ONCE = """
import os, pathlib, signal
from lightning import Callback

class KillOnce(Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *arguments):
        if trainer.global_step == self.step and not pathlib.Path("killed").exists():
            pathlib.Path("killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
"""


def killed_run(folder: Path, *overrides: str, save_every: int, kill_at: int) -> Path:
    """A run that a SIGKILL ended right after a step."""
    (folder / "killer.py").write_text(KILL_ONCE)
    killer = ("+callbacks.killer._target_=killer.KillOnce", f"+callbacks.killer.step={kill_at}")
    outcome = subprocess_cli(
        "train", *RUN, *overrides, *killer, f"callbacks.checkpoint.every_n_train_steps={save_every}", cwd=folder
    )
    assert outcome.code == -signal.SIGKILL, outcome
    run = only_run(folder / "runs")
    newest = kill_at // save_every * save_every
    assert f"step={newest}.ckpt" in {file.name for file in (run / "checkpoints").iterdir()}
    assert not (run / "metrics.json").exists()
    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "save_every", "kill_at"),
    [
        (["data.num_workers=0", "states_memory_gb=1"], 2, 7),
        (["data.num_workers=2", "data.accumulate=2", "loss=kl"], 3, 4),  # 2 steps an epoch
        (["data.num_workers=2"], 4, 9),
    ],
    ids=["inside an epoch, remembered states", "inside an epoch, workers", "at the end of an epoch, workers"],
)
def test_a_killed_run_resumes_exactly(lkspec_cli, tmp_path, overrides, save_every, kill_at):
    whole = lkspec_cli("train", *RUN, *overrides, "run_root=whole")
    assert whole.code == 0, whole.err
    run = killed_run(tmp_path, *overrides, save_every=save_every, kill_at=kill_at)
    resumed = lkspec_cli("train", "resume=latest")
    assert resumed.code == 0, resumed.err
    uninterrupted = only_run(Path("whole"))
    first = kill_at // save_every * save_every
    assert_same_training(uninterrupted, run, atol=1e-6, from_step=first)
    assert min(logged(run, "train/loss")) == first
    seen = [list(logged(folder, "train/supervised_tokens").values())[-1] for folder in (uninterrupted, run)]
    assert seen[0] == seen[1]
    assert (run / "metrics.json").exists()


@pytest.fixture(scope="module")
def finished(tmp_path_factory, module_cli) -> Path:
    """The folder of a finished run's root."""
    folder = tmp_path_factory.mktemp("finished")
    outcome = module_cli(folder, "train", *TINY_RUN, *BRIEF_EVALUATION, "trainer.max_steps=2")
    assert outcome.code == 0, outcome.err
    return folder


def test_overrides_that_would_change_the_run_are_refused(lkspec_cli, finished):
    run = only_run(finished / "runs")
    line = lkspec_cli("train", f"resume={run}", "optimizer.lr=1e-3", "seed=1", "logger=csv").error_line
    assert "optimizer.lr=1e-3, seed=1" in line
    assert "logger" not in line


def test_a_run_without_a_checkpoint_cannot_be_resumed(lkspec_cli, finished):
    config = (only_run(finished / "runs") / "config.yaml").read_text()
    Path("runs/dead").mkdir(parents=True)
    Path("runs/dead/config.yaml").write_text(config)
    assert "no checkpoint" in lkspec_cli("train", "resume=dead").error_line


def test_a_finished_run_resumes_to_itself_wherever_it_lies_now(lkspec_cli, tmp_path, finished):
    os.rename(finished / "runs", tmp_path / "moved")
    run = only_run(tmp_path / "moved")
    before, rows = weights(run), (run / "results.csv").read_text().count("\n")
    outcome = lkspec_cli("train", f"resume={run}", "logger=csv")
    os.rename(tmp_path / "moved", finished / "runs")
    assert outcome.code == 0, outcome.err
    assert not (tmp_path / "runs").exists()  # where its configuration still says it lies
    run = only_run(finished / "runs")
    assert (run / "csv").is_dir()
    assert all(torch.equal(value, before[name]) for name, value in weights(run).items())
    assert (run / "results.csv").read_text().count("\n") == rows
