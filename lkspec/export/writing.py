"""Writes an export, reads it back, compares its q with the draft's, and only then puts it in its place."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lkspec.drafts.base import Draft
from lkspec.export.base import Layout, WriteOptions, dtype_name, write_json
from lkspec.export.reading import LAYOUTS, Pretrained
from lkspec.export.serving import ServeCommand
from lkspec.export.verify import TOLERANCE, RealText, largest_q_difference
from lkspec.files import atomic_dir
from lkspec.targets.base import Target

RECORD = "lkspec_export.json"
WRITABLE = tuple(layout for layout in LAYOUTS if layout.format is not None)
FORMATS = tuple(str(layout.format) for layout in WRITABLE)


@dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        checks: one sentence each of what was compared.
        commands: how engines are started with it, at its final place.
    """

    path: Path
    layout: Layout
    options: WriteOptions
    checks: tuple[str, ...]
    commands: tuple[ServeCommand, ...]


def formats_and_drafts(layouts: Iterable[Layout] = WRITABLE) -> str:
    """Which drafts each format is for, in words."""
    return ", ".join(f"{layout.format} ({layout.draft_class.__name__})" for layout in layouts)


def layout_for(name: str | None, draft: Draft) -> Layout:
    """The layout of a format's name; without one, the first that holds such a draft.

    Raises:
        ValueError: an unknown format, or one of another class of draft, or a draft that no format holds.
    """
    if name is not None and name not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {name!r}")
    fitting = [layout for layout in WRITABLE if isinstance(draft, layout.draft_class)]
    if not fitting:
        raise ValueError(
            f"no format holds drafts of class {type(draft).__name__}; there are {formats_and_drafts()}. Evaluate the "
            "run in process (lkspec evaluate), or describe its format as a Layout beside those of lkspec/export"
        )
    for layout in fitting:
        if name in (None, layout.format):
            return layout
    raise ValueError(
        f"format={name} is not for drafts of class {type(draft).__name__}; there are {formats_and_drafts()}: use "
        f"format={' or '.join(str(layout.format) for layout in fitting)}"
    )


def refuse_existing(path: Path, *, overwrite: bool) -> None:
    """Refuses a place that is taken; only exports are ever overwritten.

    Raises:
        ValueError: something is there.
    """
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not (path / RECORD).is_file():
        raise ValueError(f"out={path}: there is something else than an export of lkspec; choose another place")
    if not overwrite:
        raise ValueError(f"out={path}: there is an export already; overwrite=true replaces it")


def write_export(
    draft: Draft,
    target: Target,
    path: Path,
    *,
    layout: Layout,
    options: WriteOptions,
    overwrite: bool = False,
    card: Callable[[Export], str] | None = None,
) -> Export:
    """Writes ``path``: weights, config, a model card and ``lkspec_export.json``.

    What is written is read back, and its q compared with the draft's on a real prompt, before anything appears at
    ``path``. Weights of less than float32 are compared before they are rounded; what rounding does to q is said.

    Raises:
        ValueError: ``path`` is taken, the format cannot express the draft, or what was written is not the draft.
    """
    refuse_existing(path, overwrite=overwrite)
    num_draft_tokens = options.num_draft_tokens
    draft.check_num_draft_tokens(num_draft_tokens)
    text = RealText.answered_by(target, num_draft_tokens=num_draft_tokens)

    def moved_q(folder: Path, options: WriteOptions) -> float:
        """Writes, and compares q with that of what is read back."""
        layout.write(folder, draft, target, options)
        try:
            again = Pretrained.open(str(folder)).build(target)
        except ValueError as error:
            raise ValueError(f"format={layout.format} does not hold a {type(draft).__name__}: {error}") from error
        return largest_q_difference(draft, again, text, num_draft_tokens=num_draft_tokens)

    with atomic_dir(path, replace=True) as folder:
        exact = None
        if options.dtype != torch.float32 or options.target_copy:
            with tempfile.TemporaryDirectory(dir=folder) as unrounded:
                exact = moved_q(Path(unrounded), replace(options, dtype=torch.float32, target_copy=False))
        found = moved_q(folder, options)
        difference = found if exact is None else exact
        if not difference <= TOLERANCE:
            raise ValueError(
                f"the export, read back, proposes another q than the run: they differ by {difference:.1e} (allowed "
                f"{TOLERANCE:.0e}); nothing was written. format={layout.format} holds what "
                f"{layout.draft_class.__name__} computes; if this draft does, please report it as a defect of lkspec"
            )
        written = Pretrained.open(str(folder)).folder
        checks = (*layout.checks(written, draft, target), _q_check(text, found, exact, options))
        commands = layout.serve_commands(draft, options.target_path(target), str(path.absolute()), options)
        export = Export(path, layout, options, checks, tuple(commands))
        if card is not None:
            (folder / "README.md").write_text(card(export), encoding="utf-8")
        write_json(folder / RECORD, {"format": layout.format, "checks": checks, "loaded_by": layout.loaded_by})
    return export


def _q_check(text: RealText, found: float, exact: float | None, options: WriteOptions) -> str:
    where = (
        f"from the run's on prompt {text.prompt_id} of mini_chat with the target's answer, {len(text.anchors)} rounds"
    )
    where += f" of {options.num_draft_tokens} tokens (allowed {TOLERANCE:.0e})"
    if exact is None:
        return f"q, read back: at most {found:.1e} {where}"
    saved = "as the target has them" if options.target_copy else dtype_name(options.dtype)
    rounding = f"the weights as saved ({saved}) move q by at most {found:.1e}"
    return f"q, read back in float32: at most {exact:.1e} {where}; {rounding}"
