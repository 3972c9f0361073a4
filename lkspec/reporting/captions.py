"""What stands under a table: how many seeds and prompts, what the intervals hold, how small an effect could be seen."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

from lkspec.reporting.counts import HELD_OUT
from lkspec.reporting.labels import label, sort_key
from lkspec.reporting.layout import Layout
from lkspec.reporting.model import OURS, Table
from lkspec.reporting.paper import CITATION, PaperTable
from lkspec.reporting.series import Series

_MEANING = {
    "tau": "tau: acceptance length, 1 + accepted / rounds, by speculative decoding",
    "whole_rounds": "whole_rounds: acceptance length by decoding over the rounds whose K proposals lie inside the text",
    "accepted": "accepted: share of rounds that accept at least `depth` tokens, by decoding",
    "walk": "walk: acceptance length along held-out answers of the target, without decoding",
    "alpha": "alpha: mean acceptance rate at `depth` along held-out answers of the target",
    "speedup": "speedup: tokens per second over the target alone, batch size 1",
    "tokens_per_second": "tokens_per_second: of decoding, wall time",
}
_NAMES = ("draft", "loss", "objective", "target")  # keys whose values say by themselves what they are


def caption(
    table: Table, layout: Layout, shown: Sequence[Series], apart: Iterable[str], paper: PaperTable
) -> tuple[str, ...]:
    """The sentences under a table; ``apart`` are those about what sets rows apart from their baselines."""
    return (
        *(f"{_MEANING[value]}." for value in layout.values),
        _numbers_of(shown),
        _intervals(layout, shown, table),
        *_gains(table, layout),
        *apart,
        *_code(shown),
        *_paper(layout, paper),
    )


def _numbers_of(shown: Sequence[Series]) -> str:
    by_run: dict[tuple[str, str], set[str]] = {}
    prompts: dict[str, set[int]] = {}
    for one in shown:
        by_run.setdefault((label(one.get("draft")), label(one.get("objective"))), set()).add(label(one.get("seed")))
        count = len(one.groups) or int(one.settings["protocol"].get("num_prompts", 0))
        prompts.setdefault(label(one.get("benchmark")), set()).add(count)
    everyone = sorted(set().union(*by_run.values()), key=sort_key)
    text = f"Seeds: {', '.join(everyone)}"
    if len({len(seeds) for seeds in by_run.values()}) > 1:
        few = [f"{draft} {loss} {len(seeds)}" for (draft, loss), seeds in by_run.items() if len(seeds) < len(everyone)]
        text += f" (fewer: {'; '.join(few)})"
    listed = [f"{name} {_range(counts)}" for name, counts in sorted(prompts.items())]
    what = "Held-out answers" if set(prompts) == {HELD_OUT} else "Prompts"
    depths = sorted({label(one.get("num_draft_tokens")) for one in shown}, key=sort_key)
    targets = sorted({label(one.get("target")) for one in shown})
    return f"{text}. {what}: {', '.join(listed)}. K = {', '.join(depths)}. Target: {', '.join(targets)}."


def _range(counts: set[int]) -> str:
    if counts == {0}:
        return "of unknown number"
    return f"{min(counts)}-{max(counts)}" if len(counts) > 1 else str(*counts)


def _intervals(layout: Layout, shown: Sequence[Series], table: Table) -> str:
    seeds = {cell.estimate.num_seeds for row in table.rows if row.source == OURS for cell in row.cells if cell.estimate}
    text = f"Mean over seeds ± half of the {layout.confidence:.0%} interval"
    if seeds == {1}:
        text += ": one seed, so the intervals hold the spread over prompts only, not that between trainings"
    else:
        text += ", which holds the spread over seeds and over prompts"
        text += " (cells of one seed: over prompts only)" if 1 in seeds else ""
        text += "; two seeds say little of their spread: three or more are better" if 2 in seeds else ""
    alone = ", ".join(sorted({label(one.get("engine")) for one in shown if not one.groups}))
    unknown = f" The prompts behind {alone} numbers are not known apart: they show no spread." if alone else ""
    return f"{text}.{unknown}"


def _gains(table: Table, layout: Layout) -> Iterator[str]:
    if layout.baseline is None:
        return
    base = ", ".join(text if key in _NAMES else f"{key} {text}" for key, text in layout.baseline_keys.items())
    widths: dict[str, list[float]] = {value: [] for value in layout.values}
    for row in table.rows:
        for column, cell in zip(table.columns, row.cells, strict=True):
            if row.source == OURS and cell.gain is not None:
                widths[layout.split(column)[1]].append(cell.gain.half_width)
    count = sum(map(len, widths.values()))
    if not count:
        yield f"No gain over {base} could be paired: the baseline is missing, or has none of the seeds."
        return
    yield (
        f"Signed: the gain over {base}, paired by seed and prompt; bold where its interval excludes 0 "
        f"(of {count} gains, {(1 - layout.confidence) * count:.1f} would by chance alone)."
    )
    for value, halves in widths.items():
        if known := [width for width in halves if math.isfinite(width)]:
            name = f" of {value}" if len(widths) > 1 else ""
            low, high = (f"{width:.{layout.digits}f}" for width in (min(known), max(known)))
            text = f"{low}." if low == high else f"{low} to {high}, by cell."
            yield f"Smallest visible effect{name} (half of a gain's interval): {text}"


def _code(shown: Sequence[Series]) -> Iterator[str]:
    versions = {run.code_hash for run in {one.run.name: one.run for one in shown}.values()}
    if len(versions) > 1:
        yield f"The runs were made by {len(versions)} versions of the code."


def _paper(layout: Layout, paper: PaperTable) -> Iterator[str]:
    if paper.rows.empty:
        return
    targets = ", ".join(name for (name,) in paper.labels(["target"]))
    table = layout.paper if str(layout.paper).startswith("figure") else f"Table {layout.paper}"
    depths = ", ".join(f"{draft} {depth}" for draft, depth in paper.labels(["draft", "num_draft_tokens"]))
    yield (
        f"paper: {CITATION}, {table}; other targets ({targets}), more training, whole benchmarks, K: {depths}; neither "
        "seeds nor intervals are given. Compare the signs and sizes of gains, not tau."
    )
