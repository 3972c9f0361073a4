"""Every experiment file still composes and trains: one step of it, on tiny parts."""

from pathlib import Path

import pytest
from command_line import CPU, NO_EVALUATION

from lkspec.config import config_dir

EXPERIMENTS = sorted(path.stem for path in (config_dir() / "experiment").glob("*.yaml"))


def test_there_are_experiments():
    assert "quickstart" in EXPERIMENTS


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_takes_a_step(lkspec_cli, tmp_path, name):
    tiny = ("target=tiny", "data=tiny", "data.max_length=320", "data.max_tokens=768", "trainer.max_epochs=1")
    outcome = lkspec_cli(
        "train", f"experiment={name}", *tiny, "trainer.max_steps=1", "trainer.limit_val_batches=1", *CPU, *NO_EVALUATION
    )
    assert outcome.code == 0, outcome.err
    assert list(Path(tmp_path).glob("runs/*/checkpoints/step=1.ckpt"))
