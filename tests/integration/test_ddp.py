"""Two processes on one machine train and measure what one process does."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from command_line import BRIEF_EVALUATION, TINY_RUN, assert_same_training, logged, only_run, run_process

from lkspec.results import RunFolder

pytestmark = pytest.mark.slow

# A step takes two micro-batches of the epoch's plan: one of each process, or two of one. (lk_lambda's weight belongs to
# the micro-batches of one moment, so that only objectives without it are the same in both.)
RUN = (*TINY_RUN, *BRIEF_EVALUATION, "benchmark.num_prompts=3", "loss=tv", "logger=csv")
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


@pytest.mark.parametrize("entry", ["console script", "module"])
def test_two_processes_train_like_one_that_accumulates(tmp_path, alone, entry):
    command = [console_script(), "train"] if entry == "console script" else [sys.executable, "-m", "lkspec.train"]
    overrides = (*RUN, *TWO_PROCESSES, "trainer.max_epochs=2", "trainer.max_steps=20")
    outcome = run_process([*command, *overrides], cwd=tmp_path)
    assert outcome.code == 0, outcome.err
    run = only_run(tmp_path / "runs")
    assert_same_training(alone, run, atol=1e-5)
    for name in ("train/supervised_tokens", "train/alpha/depth_2", "train/grad_norm", "val/text/kl/depth_1"):
        assert logged(run, name) == pytest.approx(logged(alone, name), rel=1e-4), name
    rows, expected = RunFolder(run).read_results(), RunFolder(alone).read_results()
    assert [row.num_prompts for row in rows] == [3, 3]
    assert [(row.tau, row.alpha) for row in rows] == [(row.tau, row.alpha) for row in expected]
    prompts = {(row.prompt_id, row.temperature, row.round) for row in RunFolder(run).read_rounds()}
    assert len(prompts) == len(RunFolder(run).read_rounds())
    assert outcome.out.count("acceptance length after training") == 1
    assert "sync_dist" not in outcome.err


def test_processes_resume_together(tmp_path):
    overrides = (*RUN, *TWO_PROCESSES, "~callbacks.acceptance_length", "callbacks.checkpoint.every_n_train_steps=1")
    command = [sys.executable, "-m", "lkspec.train"]
    outcome = run_process([*command, *overrides, "trainer.max_epochs=2"], cwd=tmp_path)
    assert outcome.code == 0, outcome.err
    run = only_run(tmp_path / "runs")
    losses = logged(run, "train/loss")
    assert sorted(losses) == [0, 1, 2, 3]
    (run / "checkpoints" / "step=4.ckpt").unlink()  # as if it had been killed before its last step, inside an epoch
    outcome = run_process([*command, "resume=latest"], cwd=tmp_path)
    assert outcome.code == 0, outcome.err
    assert logged(run, "train/loss") == pytest.approx({3: losses[3]}, abs=1e-6)


def test_an_error_in_two_processes_ends_both(tmp_path):
    outcome = run_process([sys.executable, "-m", "lkspec.train", *RUN, *TWO_PROCESSES, "optimizer.lr=-1"], cwd=tmp_path)
    assert outcome.code == 2
    assert "Error: " in outcome.err
    assert "Traceback" not in outcome.err
