"""Fixtures that run the command line in this process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from command_line import Outcome, Run, run_cli


@pytest.fixture
def lkspec_cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """``lkspec_cli(verb, *overrides)``: the console entry in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    return run_cli


@pytest.fixture(scope="module")
def module_cli() -> Run:
    """``module_cli(folder, verb, *overrides)``: the same in a given folder, for fixtures of a whole module."""

    def run(folder: Path, *arguments: str, stdin: str = "") -> Outcome:
        before = Path.cwd()
        os.chdir(folder)
        try:
            return run_cli(*arguments, stdin=stdin)
        finally:
            os.chdir(before)

    return run
