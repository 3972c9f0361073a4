"""``lkspec report``: joins run folders into a table, with intervals, paired gains and the paper's numbers beside."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from omegaconf import DictConfig

from lkspec.app.application import resolved
from lkspec.files import write_text
from lkspec.reporting.counts import find_runs
from lkspec.reporting.figure_style import save
from lkspec.reporting.figures import lines_figure
from lkspec.reporting.layout import Layout
from lkspec.reporting.renderers import RENDERERS
from lkspec.reporting.series import flat
from lkspec.reporting.tables import build_table
from lkspec.reporting.terminal import errors


def main(config: DictConfig) -> None:
    """Prints a table of many runs, or writes it to ``out``."""
    if config.format not in (*RENDERERS, "png"):
        raise ValueError(f"format: expected one of {', '.join((*RENDERERS, 'png'))}, got {config.format!r}")
    if config.format == "png" and config.out is None:
        raise ValueError("format=png writes a picture: say where to, as out=figure.png")
    options = resolved(config)
    settings = {key.name: options[key.name] for key in fields(Layout)}
    for name, value in settings.items():
        if isinstance(value, dict):
            settings[name] = flat(value)  # where.optimizer.lr=... means the key optimizer.lr
    layout = Layout(**settings)
    table = build_table(find_runs(options["runs"]), layout)
    if config.format == "png":
        save(lines_figure(table), Path(config.out))
    elif config.out is not None:
        write_text(Path(config.out), RENDERERS[config.format](table))
    else:
        print(RENDERERS[config.format](table), end="")
        return
    errors.print(f"report: {config.out}", soft_wrap=True)
