"""Two processes on one machine train and measure what one process does."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from command_line import BRIEF_EVALUATION, TINY_RUN, Outcome, assert_same_training, logged, only_run, run_process

from lkspec.runs.folder import RunFolder

pytestmark = pytest.mark.slow

# A step takes two micro-batches of the epoch's plan: one of each process, or two of one. (lk_lambda's weight belongs to
# the micro-batches of one moment, so that only objectives without it are the same in both.)
# There is one validation conversation: the second process validates a batch without any text.
RUN = (*TINY_RUN, *BRIEF_EVALUATION, "benchmark.num_prompts=3", "loss=tv", "logger=csv", "states_memory_gb=1")
TWO_PROCESSES = ("trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu", "trainer.log_every_n_steps=1")


def console_script() -> str:
    script = shutil.which("lkspec", path=str(Path(sys.executable).parent))
    if script is None:
        pytest.skip("the console script is not installed beside this Python")
    return script


@pytest.fixture(scope="module")
def alone(tmp_path_factory, module_cli) -> Path:
    """The run of one process that accumulates two micro-batches."""
    folder = tmp_path_factory.mktemp("alone")
    outcome = module_cli(folder, "train", *RUN, "data.accumulate=2", "trainer.max_epochs=2")
    assert outcome.code == 0, outcome.err
    return only_run(folder / "runs")


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> tuple[Path, Outcome]:
    """The run of two processes, started by the console script, and what it printed."""
    folder = tmp_path_factory.mktemp("together")
    overrides = (*RUN, *TWO_PROCESSES, "trainer.max_epochs=2", "callbacks.checkpoint.every_n_train_steps=1")
    outcome = run_process([console_script(), "train", *overrides], cwd=folder)
    assert outcome.code == 0, outcome.err
    return only_run(folder / "runs"), outcome


def test_two_processes_train_like_one_that_accumulates(together, alone):
    run, outcome = together
    assert len(logged(run, "train/loss")) == 4
    assert_same_training(alone, run, atol=1e-5)
    for name in ("train/supervised_tokens", "train/alpha/depth_2", "train/grad_norm", "val/text/kl/depth_1"):
        assert logged(run, name) == pytest.approx(logged(alone, name), rel=1e-4), name
    assert outcome.out.count("acceptance length after training") == 1
    assert "sync_dist" not in outcome.err
    assert "broadcast_buffers" not in outcome.err


def test_two_processes_measure_like_one(together, alone):
    run = RunFolder(together[0])
    rows, expected = run.read_results(), RunFolder(alone).read_results()
    assert [row.num_prompts for row in rows] == [3, 3]
    assert [(row.tau, row.low, row.high, row.alpha) for row in rows] == [
        (row.tau, row.low, row.high, row.alpha) for row in expected
    ]
    assert run.read_rounds() == RunFolder(alone).read_rounds()


def test_processes_resume_together(tmp_path, together):
    # As if it had been killed before its last step, inside an epoch.
    shutil.copytree(together[0].parent, tmp_path / "runs")
    run = only_run(tmp_path / "runs")
    (run / "checkpoints" / "step=4.ckpt").unlink()
    assert RunFolder(run).last_checkpoint.name == "step=3.ckpt"
    outcome = run_process([sys.executable, "-m", "lkspec.cli", "train", "resume=latest"], cwd=tmp_path)
    assert outcome.code == 0, outcome.err
    last = logged(together[0], "train/loss")[3]
    assert logged(run, "train/loss") == pytest.approx({3: last}, abs=1e-6)


def test_an_error_in_two_processes_ends_both(tmp_path):
    outcome = run_process(
        [sys.executable, "-m", "lkspec.cli", "train", *RUN, *TWO_PROCESSES, "optimizer.lr=-1"], cwd=tmp_path
    )
    assert outcome.code == 2
    assert "Error: " in outcome.err
    assert "Traceback" not in outcome.err
