"""Puts a run's draft and target where an engine can load them, and the engine behind them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from omegaconf import DictConfig

from lkspec.assemble import TrainedRun
from lkspec.config import instantiate
from lkspec.engines.vllm_engine import VllmEngine
from lkspec.export.base import WriteOptions
from lkspec.export.writing import layout_for, write_export

# What vLLM calls a draft of each format, with the words that make it sample from q (it drafts by argmax otherwise).
_SPECULATIVE_CONFIG = {
    "vllm": {"method": "eagle3", "draft_sample_method": "probabilistic"},
    "medusa": {"method": "medusa"},
}


@contextmanager
def served_by_vllm(config: DictConfig, run: TrainedRun, num_draft_tokens: int) -> Iterator[VllmEngine]:
    """The engine of a configuration, ready to answer with the run's target and its exported draft.

    Raises:
        ValueError: a draft that vLLM does not serve, or a target that is only in memory.
    """
    layout = layout_for(None, run.draft)
    if layout.format not in _SPECULATIVE_CONFIG:
        raise ValueError(f"engine=vllm: vLLM does not serve this draft ({run.draft.served_by})")
    if run.target.source is None:
        raise ValueError(f"engine=vllm: {run.target.name} was made in memory; vLLM needs a target's folder or hub id")
    engine = instantiate(config)
    if not isinstance(engine, VllmEngine):
        raise ValueError("engine: evaluate takes engine=vllm; a server that is running already only answers (generate)")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "draft"
        options = WriteOptions(num_draft_tokens=num_draft_tokens)
        write_export(run.draft, run.target, out, layout=layout, options=options)
        engine.serve(run.target.source, {**_SPECULATIVE_CONFIG[layout.format], "model": str(out)}, run.target.eos_ids)
        try:
            yield engine
        finally:
            engine.close()
