"""``lkspec evaluate engine=vllm`` for a target that exists in memory only: it is saved for vLLM."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.serve, pytest.mark.slow]

TRAIN = (
    *("target=tiny", "target.num_heads=2", "target.num_kv_heads=1", "target.device=cpu"),
    *("data=tiny", "data.train=tiny:10", "data.max_tokens=512", "draft.num_depths=3"),
    *("debug=smoke", "trainer.accelerator=cpu", "~callbacks.acceptance_length"),
)
EVALUATE = (
    *("run=latest", "num_draft_tokens=[3]", "temperatures=[0]"),
    *("benchmark=mini_math", "benchmark.num_prompts=4", "++benchmark.max_new_tokens=32"),
)


def test_both_engines_measure_the_same(serve_python: str, tmp_path: Path) -> None:
    lkspec("train", *TRAIN, cwd=tmp_path)
    lkspec("evaluate", *EVALUATE, cwd=tmp_path)
    lkspec("evaluate", *EVALUATE, "engine=vllm", f"engine.python={serve_python}", cwd=tmp_path)
    (results,) = tmp_path.glob("runs/*/results.csv")
    with results.open() as file:
        rows = {row["engine"]: row for row in csv.DictReader(file)}
    assert set(rows) == {"lkspec", "vllm"}
    same = ("tau", "low", "high", "alpha_1", "alpha_2", "alpha_3", "num_prompts")
    assert {key: rows["vllm"][key] for key in same} == {key: rows["lkspec"][key] for key in same}


def lkspec(*arguments: str, cwd: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lkspec.cli", *arguments], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
