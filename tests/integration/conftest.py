"""Fixtures that run the command line in this process."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import BRIEF_EVALUATION, TRAINED_RUN, Outcome, Run, only_run, run_cli
from filelock import FileLock


@pytest.fixture
def lkspec_cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """``lkspec_cli(verb, *overrides)``: the console entry in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    return run_cli


@pytest.fixture(scope="session")
def module_cli() -> Run:
    """``module_cli(folder, verb, *overrides)``: the same in a given folder, for fixtures of more than a test."""

    def run(folder: Path, *arguments: str, stdin: str = "") -> Outcome:
        before = Path.cwd()
        os.chdir(folder)
        try:
            return run_cli(*arguments, stdin=stdin)
        finally:
            os.chdir(before)

    return run


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory, module_cli: Run) -> Callable[[str], Path]:
    """``trained_run(draft)``: a finished run of two depths and 200 tokens (mlp: all), measured at one and two.

    Made once for all tests and processes: it is read only, what writes takes a copy.
    """
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def run(draft: str) -> Path:
        folder = root / "trained" / draft
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "lock"):
            if not (folder / "done").exists():
                vocab = () if draft == "mlp" else ("vocab.size=200",)  # its format for engines knows no vocabulary
                measured = (*BRIEF_EVALUATION, "evaluation.num_draft_tokens=[1,2]")
                outcome = module_cli(folder, "train", f"draft={draft}", *TRAINED_RUN, *vocab, *measured)
                assert outcome.code == 0, outcome.err
                (folder / "done").touch()
        return only_run(folder / "runs")

    return run
