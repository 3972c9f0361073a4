"""The engine of a configuration: vLLM with a run's draft and target put where it loads them, or a running server."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from omegaconf import DictConfig

from lkspec.app.application import instantiate
from lkspec.app.load import TrainedRun
from lkspec.engines.server import Server
from lkspec.engines.server_engine import ServerEngine
from lkspec.engines.vllm_engine import VllmEngine
from lkspec.export.base import WriteOptions
from lkspec.export.writing import WRITABLE, formats_and_drafts, write_export
from lkspec.targets.base import Target


@contextmanager
def serving_engine(config: DictConfig, run: TrainedRun, num_draft_tokens: int) -> Iterator[VllmEngine | ServerEngine]:
    """The engine of a configuration, ready to answer with the run's target; K is the largest that is wanted of it.

    Raises:
        ValueError: a draft that vLLM does not serve, a server with another target.
    """
    engine = instantiate(config)
    if isinstance(engine, Server):
        names = [name for name in (run.target.source, run.target.name) if name is not None]
        yield ServerEngine(engine, target_names=names, eos_ids=run.target.eos_ids)
        return
    if not isinstance(engine, VllmEngine):
        raise ValueError(f"engine: expected vllm or server, got {config.get('_target_')}")
    served = [layout for layout in WRITABLE if layout.vllm is not None]
    layout = next((layout for layout in served if isinstance(run.draft, layout.draft_class)), None)
    if layout is None or layout.vllm is None:
        raise ValueError(
            f"engine=vllm: vLLM does not serve this draft ({run.draft.served_by}), of class "
            f"{type(run.draft).__name__}; it loads the formats (and drafts) {formats_and_drafts(served)}. Leave engine "
            "out to decode in process"
        )
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "draft"
        options = WriteOptions(num_draft_tokens=num_draft_tokens)
        write_export(run.draft, run.target, out, layout=layout, options=options)
        engine.serve(
            _source(run.target, Path(folder) / "target"),
            {**layout.vllm, "model": str(out)},
            run.target.eos_ids,
            max_positions=run.target.max_positions,
        )
        try:
            yield engine
        finally:
            engine.close()


def _source(target: Target, folder: Path) -> str:
    """Where an engine finds a target; one that was made in memory is saved into the folder."""
    if target.source is None:
        target.save(folder)
    return target.source or str(folder)
