"""Help and mistakes are answered before anything heavy is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "lightning", "transformers", "pandas", "matplotlib", "pyarrow", "tensorboard", "numpy")
ANSWER = """
import json, sys
from lkspec import cli

try:
    cli.main()
except SystemExit:
    pass
print(json.dumps(sorted(set(sys.modules))))
"""


def answered(folder: Path, *arguments: str) -> tuple[str, str, set[str]]:
    """What a command prints on both streams, and the modules that it imports."""
    command = [sys.executable, "-c", ANSWER, *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "HYDRA_FULL_ERROR"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    *lines, modules = done.stdout.splitlines()
    return "\n".join(lines), done.stderr, set(json.loads(modules))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["trian"], "Error: unknown verb 'trian'; did you mean train? "),
        (["train", "draft=eagle4"], "Error: draft=eagle4: did you mean eagle3? (draft is one of "),
        (["train", "-m", "loss=kl,lk_alpa"], "Error: loss=lk_alpa: did you mean lk_alpha? (loss is one of "),
        (["train", "drafft=mlp"], "Error: drafft=mlp: there is no drafft; did you mean draft? "),
        (["train", "optimizer.lrr=1"], "Error: optimizer.lrr=1: there is no optimizer.lrr; did you mean lr? "),
        (["train", "seed=abc"], "Error: seed=abc: expected a number, got 'abc'"),
        (["train", "data=jsonl"], "Error: data.train has no value yet: give one as data.train=..."),
        (["train", "seed"], "Error: seed: expected key=value ("),
        (["train", "resume=none"], "Error: run 'none': there are no runs under runs "),
        (["evaluate", "run=none"], "Error: run 'none': there are no runs under runs "),
        (["evaluate"], "Error: run has no value yet: give one as run=... "),
        (["inspect", "loss=kl"], "Error: Could not override 'loss'. "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_is_one_line_without_heavy_imports(tmp_path, arguments, told):
    out, err, modules = answered(tmp_path, *arguments)
    assert out == ""
    assert err.startswith(told), err
    assert len(err.splitlines()) == 1, err
    assert not modules & set(HEAVY)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("verb", ["train", "report"])
def test_help_needs_nothing_heavy(tmp_path, verb):
    out, err, modules = answered(tmp_path, verb, "--help")
    assert out.startswith(f"lkspec {verb}: ")
    assert err == ""
    assert not modules & set(HEAVY)
