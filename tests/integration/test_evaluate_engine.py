"""``lkspec evaluate engine=vllm`` with the stand-in for vLLM: the export it is given, and rows beside ours."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest
from command_line import BRIEF_EVALUATION, NO_EVALUATION, TINY_DATA, Run, only_run

from lkspec.targets.tiny import TinyTarget

pytestmark = pytest.mark.slow

FAKE = Path(__file__).parents[1] / "fake_vllm"
ENGINE = ("engine=vllm", f"engine.python={sys.executable}")


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(FAKE))


def train(cli: Run, tmp_path: Path, *overrides: str) -> None:
    target = TinyTarget(device="cpu")
    target.model.save_pretrained(tmp_path / "target")
    target.tokenizer.save_pretrained(tmp_path / "target")
    saved = ("target=transformers", f"target.path={tmp_path / 'target'}", "target.dtype=float32", "target.device=cpu")
    data = [override for override in TINY_DATA if not override.startswith("target")]
    run = (*data, *saved, "trainer=smoke", "trainer.max_steps=1", "trainer.accelerator=cpu", *NO_EVALUATION)
    outcome = cli("train", *run, "draft.num_depths=2", *overrides)
    assert outcome.code == 0, outcome.err


def test_rows_of_the_engine_stand_beside_ours(lkspec_cli, tmp_path):
    train(lkspec_cli, tmp_path)
    measured = ("run=latest", *BRIEF_EVALUATION, "num_draft_tokens=[2]", "temperatures=[1]")
    assert lkspec_cli("evaluate", *measured).code == 0
    outcome = lkspec_cli("evaluate", *measured, *ENGINE)
    assert outcome.code == 0, outcome.err
    assert "decoded by vllm" in outcome.out
    with (only_run() / "results.csv").open() as file:
        rows = {row["engine"]: row for row in csv.DictReader(file)}
    assert set(rows) == {"lkspec", "vllm"}
    # The stand-in accepts one token in every round, at the first position.
    assert (rows["vllm"]["tau"], rows["vllm"]["alpha_1"], rows["vllm"]["alpha_2"]) == ("2.0", "1.0", "0.0")
    assert rows["vllm"]["tau_whole_rounds"] == ""


def test_a_draft_that_vllm_does_not_serve(lkspec_cli, tmp_path):
    train(lkspec_cli, tmp_path, "draft=mtp")
    outcome = lkspec_cli("evaluate", "run=latest", *BRIEF_EVALUATION, *ENGINE)
    assert outcome.code == 2
    assert "vLLM does not serve this draft (research only" in outcome.err


def test_a_target_in_memory(lkspec_cli):
    assert lkspec_cli("train", *TINY_DATA, "trainer=smoke", "trainer.max_steps=1", *NO_EVALUATION).code == 0
    outcome = lkspec_cli("evaluate", "run=latest", *BRIEF_EVALUATION, *ENGINE)
    assert outcome.code == 2
    assert "tiny_llama was made in memory" in outcome.err
