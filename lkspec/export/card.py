"""The model card (README.md) of an export, from the run's configuration and results; its text is card.md.jinja."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import ChainableUndefined, Environment

from lkspec.drafts.base import Draft
from lkspec.export.writing import Export
from lkspec.runs.rows import ResultRow
from lkspec.targets.base import Target

_TEMPLATE = Path(__file__).with_name("card.md.jinja")


@dataclass(frozen=True)
class Facts:
    """What a card says of the run.

    Attributes:
        run: its name.
        config: its configuration, plain.
        origin: commit and code hash of its creation.
        info: data fingerprint and supervised tokens seen.
        step: optimiser steps taken.
        rows: its results.
        license: of the weights, in the hub's words; None is not stated.
        sharpness: what the heads were multiplied by after training.
    """

    run: str
    config: Mapping[str, Any]
    origin: Mapping[str, str]
    info: Mapping[str, Any]
    step: int
    rows: Sequence[ResultRow]
    license: str | None
    sharpness: float = 1.0


def model_card(facts: Facts, draft: Draft, target: Target, export: Export) -> str:
    """Markdown with the hub's header; nothing in it names a path of this machine."""
    known = _public_name(target)
    name = export.options.target_id or known
    path = export.options.target_id or (known if known == target.source else "TARGET_PATH_OR_ID")
    # At T = 0 the heads may be multiplied by anything.
    rows = [row for row in newest(facts.rows) if row.temperature == 0 or row.sharpness == facts.sharpness]
    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=ChainableUndefined
    )
    environment.filters |= {"json": json.dumps, "named": _named, "arguments": _arguments}
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        facts=facts,
        config=facts.config,
        draft=draft,
        target=target,
        export=export,
        name=draft.title or type(draft).__name__,
        target_name=name,
        rows=rows,
        depths=range(1, 1 + max((len(row.alpha) for row in rows), default=0)),
        protocols=[json.loads(protocol) for protocol in dict.fromkeys(row.protocol for row in rows)],
        commands=export.layout.serve_commands(draft, path, "PATH_OR_ID", export.options),
    )


def _public_name(target: Target) -> str:
    """A hub id as it is; of a folder only its name, which says nothing of somebody's machine."""
    source = target.source
    return source if source is not None and "/" in source and not Path(source).exists() else target.name


def newest(rows: Sequence[ResultRow]) -> list[ResultRow]:
    """The rows after the most steps of training."""
    last = max((row.steps for row in rows), default=0)
    return sorted(
        (row for row in rows if row.steps == last),
        key=lambda row: (row.benchmark, row.engine, row.temperature, row.num_draft_tokens),
    )


def _named(source: Any) -> str:
    """A data set, run or checkpoint; of a path on this machine only its last part."""
    if isinstance(source, list):
        return ", ".join(map(_named, source))
    path = Path(str(source))
    return f"`{path.name if path.is_absolute() or path.exists() else source}`"


def _arguments(settings: Mapping[str, Any]) -> str:
    """What a configured class is given."""
    return json.dumps({key: value for key, value in settings.items() if not key.startswith("_")})
