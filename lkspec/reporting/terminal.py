"""What the command line prints with: one console, plain lines, facts, tables and progress bars."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

console, errors = Console(), Console(stderr=True)
for _console in (console, errors):
    if not _console.is_terminal:
        _console.width = 140  # a log file wraps little

Advance = Callable[..., None]
"""``advance(number=1, tokens=None, total=None)``: so much more is done, which took so many tokens, of now so much."""


def say(text: str) -> None:
    """Prints a line as it is: nothing in it is markup, and only a terminal breaks it."""
    console.print(text, soft_wrap=True, highlight=False, markup=False)


def facts(texts: Mapping[str, str]) -> None:
    """Prints a line for each: the name in bold, then its text."""
    for name, text in texts.items():
        console.print(Text.assemble((f"{name:<11}", "bold"), text), soft_wrap=True)


def table(
    title: str | None, columns: Sequence[str], rows: Iterable[Sequence[str | Text]], *, left: Collection[str] = ()
) -> None:
    """Prints a table; columns are aligned to the right but for those named in ``left``."""
    shown = Table(title=None if title is None else Text(title, style="table.title"), title_justify="left")
    for name in columns:
        shown.add_column(name, justify="left" if name in left else "right", overflow="fold")
    for row in rows:
        shown.add_row(*row)
    console.print(shown, markup=False)


@contextmanager
def progress(
    description: str, total: int | None, unit: str, *, done: int = 0, transient: bool = False, visible: bool = True
) -> Iterator[Advance]:
    """A bar with what is done, the rate and the time left.

    Args:
        description: stands before the bar.
        total: how much there is to do; None where it is said later.
        unit: what is counted; the rate is of tokens where ``advance`` is told of them.
        done: what an earlier call did.
        transient: leave nothing behind.
        visible: False shows nothing, as on ranks other than the first.
    """
    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f}/{task.fields[all]} " + unit),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    ]
    with Progress(*columns, console=console, refresh_per_second=2, transient=transient, disable=not visible) as bar:
        task = bar.add_task(description, total=total, completed=done, all=_count(total), rate="")
        counted = 0

        def advance(number: int = 1, *, tokens: int | None = None, total: int | None = None) -> None:
            nonlocal counted
            counted += number if tokens is None else tokens
            rate = counted / (bar.tasks[0].elapsed or 1e-9)
            what = unit if tokens is None else "tokens"
            bar.update(task, advance=number, rate=f"{rate:{',.0f' if rate >= 10 else '.2g'}} {what}/s")
            if total is not None:
                bar.update(task, total=total, all=_count(total))

        yield advance


def _count(number: int | None) -> str:
    return "?" if number is None else f"{number:,}"
