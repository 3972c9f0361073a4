"""The serving environment, an interpreter of its own; without it these tests are skipped."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

_MADE_BY = "`make serve-env` sets it up (3.7 GB)"
_HAS_SPECULATORS = "import importlib.util, sys; sys.exit(importlib.util.find_spec('speculators') is None)"


@pytest.fixture(scope="session")
def serve_python() -> str:
    """The interpreter with vLLM: LKSPEC_SERVE_PYTHON, else that of .serve-venv."""
    named = os.environ.get("LKSPEC_SERVE_PYTHON")
    python = Path(named) if named else Path(__file__).parents[2] / ".serve-venv" / "bin" / "python"
    if not python.is_file():
        pytest.skip(f"there is no serving environment ({python}): {_MADE_BY}")
    return str(python)


@pytest.fixture(scope="session")
def speculators_python(serve_python: str) -> str:
    """The interpreter with speculators, which is the same."""
    if subprocess.run([serve_python, "-c", _HAS_SPECULATORS], check=False).returncode:
        pytest.skip(f"the serving environment ({serve_python}) has no speculators: {_MADE_BY} on a machine without GPU")
    return serve_python
