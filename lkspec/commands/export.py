"""``lkspec export``: writes a run's draft in a format that serving engines load."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from omegaconf import DictConfig

from lkspec.app.application import resolved
from lkspec.app.load import TrainedRun, open_run
from lkspec.export.base import WriteOptions
from lkspec.export.card import Facts, model_card
from lkspec.export.writing import Export, layout_for, refuse_existing, write_export
from lkspec.reporting.terminal import say
from lkspec.targets.transformers import parse_dtype


def main(config: DictConfig) -> None:
    """Writes the export and says what was checked and how to serve it."""
    out = Path(config.out).expanduser()
    refuse_existing(out, overwrite=config.overwrite)
    save_dtype = parse_dtype(config.save_dtype)
    run = open_run(config)
    if config.sharpness != 1:
        run.draft.sharpen(config.sharpness)
    layout = layout_for(config.format, run.draft)
    num_draft_tokens = config.num_draft_tokens or run.draft.num_depths
    export = write_export(
        run.draft,
        run.target,
        out,
        layout=layout,
        options=WriteOptions(save_dtype, num_draft_tokens, config.target_copy, config.target_id),
        overwrite=config.overwrite,
        card=partial(model_card, _facts(run, config), run.draft, run.target),
    )
    _report(export, run)


def _facts(run: TrainedRun, config: DictConfig) -> Facts:
    return Facts(
        run=run.folder.name,
        config=resolved(run.config),
        origin={**run.folder.origin, "code_hash": run.folder.code_hash},
        info=run.info,
        step=run.step,
        rows=run.folder.read_results(),
        license=config.license,
        sharpness=config.sharpness,
    )


def _report(export: Export, run: TrainedRun) -> None:
    say(f"exported {run.folder.name} (format={export.layout.format}) to {export.path}")
    say("checked:")
    for check in export.checks:
        say(f"  {check}")
    say(f"loaded by {export.layout.loaded_by}; for this target: {run.draft.served_by}")
    if not export.commands:
        say("no current engine serves this folder as it is")
    for command in export.commands:
        say(f"\n{command.engine} (samples from q by {command.options_for_q}):\n  {command.command}")
