"""What a results row says of the run that was measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lkspec.runs.folder import RunFolder


@dataclass(frozen=True)
class RunFacts:
    """A run, as results rows name it."""

    folder: RunFolder
    draft: str
    loss: str
    loss_arguments: dict[str, Any]
    target: str
    target_settings: dict[str, str]
    data_fingerprint: str
    seed: int
    eta: float | None
    eta_source: str | None
