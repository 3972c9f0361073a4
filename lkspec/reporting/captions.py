"""What stands under a table: how many seeds and prompts, what the intervals hold, how small an effect could be seen."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lkspec.reporting.cells import differences, recipe
from lkspec.reporting.counts import HELD_OUT
from lkspec.reporting.grid import Labels
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


@dataclass(frozen=True)
class Pair:
    """A cell's series and those of its baseline."""

    labels: Labels
    baseline: Labels
    series: Sequence[Series]
    others: Sequence[Series]


def caption(
    table: Table, layout: Layout, shown: Sequence[Series], pairs: Sequence[Pair], paper: PaperTable
) -> tuple[str, ...]:
    """The sentences under a table."""
    sentences = [
        *(f"{_MEANING[value]}." for value in layout.values),
        _numbers_of(shown),
        _intervals(layout, shown, table),
        *_gains(table, layout),
        *_recipes_differ(pairs),
        *_code(shown),
        *_paper(layout, shown, paper),
    ]
    return tuple(sentence for sentence in sentences if sentence)


def _numbers_of(shown: Sequence[Series]) -> str:
    by_run: dict[Labels, set[str]] = {}
    for one in shown:
        by_run.setdefault((label(one.get("draft")), label(one.get("objective"))), set()).add(label(one.get("seed")))
    counts = {len(seeds) for seeds in by_run.values()}
    everyone = sorted(set().union(*by_run.values()), key=sort_key)
    text = f"Seeds: {', '.join(everyone)}"
    if len(counts) > 1:
        few = [f"{draft} {loss} {len(seeds)}" for (draft, loss), seeds in by_run.items() if len(seeds) < len(everyone)]
        text += f" (fewer: {'; '.join(few)})"
    prompts: dict[str, set[int]] = {}
    for one in shown:
        count = len(one.groups) or int(one.settings["protocol"].get("num_prompts", 0))
        prompts.setdefault(label(one.get("benchmark")), set()).add(count)
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
    percent = f"{layout.confidence:.0%}"
    seeds = {cell.estimate.num_seeds for row in table.rows if row.source == OURS for cell in row.cells if cell.estimate}
    text = f"Mean over seeds ± half of the {percent} interval"
    if seeds == {1}:
        text += ": one seed, so the intervals hold the spread over prompts only, not that between trainings"
    else:
        text += ", which holds the spread over seeds and over prompts"
        if 1 in seeds:
            text += " (cells of one seed: over prompts only)"
        if 2 in seeds:
            text += "; two seeds say little of their spread: three or more are better"
    alone = sorted({label(one.get("engine")) for one in shown if not one.groups})
    unknown = (
        f" The prompts behind {', '.join(alone)} numbers are not known apart: they show no spread." if alone else ""
    )
    return f"{text}.{unknown}"


def _gains(table: Table, layout: Layout) -> Iterable[str]:
    if layout.baseline is None:
        return
    base = ", ".join(text if key in _NAMES else f"{key} {text}" for key, text in layout.baseline_keys.items())
    gains = [cell.gain for row in table.rows if row.source == OURS for cell in row.cells if cell.gain is not None]
    if not gains:
        yield f"No gain over {base} could be paired: the baseline is missing, or has none of the seeds."
        return
    yield (
        f"Signed: the gain over {base}, paired by seed and prompt; bold where its interval excludes 0 "
        f"(of {len(gains)} gains, {(1 - layout.confidence) * len(gains):.1f} would by chance alone)."
    )
    for value in layout.values:
        widths = [
            cell.gain.half_width
            for row in table.rows
            for column, cell in zip(table.columns, row.cells, strict=True)
            if row.source == OURS and cell.gain is not None and layout.split(column)[1] == value
        ]
        known = sorted(width for width in widths if math.isfinite(width))
        if known:
            name = f" of {value}" if len(layout.values) > 1 else ""
            low, high = (f"{width:.{layout.digits}f}" for width in (known[0], known[-1]))
            yield f"Smallest visible effect{name} (half of a gain's interval): {low}" + (
                "." if low == high else f" to {high}, by cell."
            )


def _recipes_differ(pairs: Sequence[Pair]) -> Iterable[str]:
    """What sets a row apart from its baseline besides the objective: a reader should know."""
    told: dict[str, None] = {}
    for pair in pairs:
        found = differences(recipe(pair.others[0]), recipe(pair.series[0]))
        other = {key: values for key, values in found.items() if not key.startswith("loss.")}
        if other:
            text = ", ".join(f"{key} {theirs} -> {ours}" for key, (theirs, ours) in list(other.items())[:6])
            told[f"{', '.join(pair.labels)} differs from {', '.join(pair.baseline)} also in {text}."] = None
    return told


def _code(shown: Sequence[Series]) -> Iterable[str]:
    versions = {one.run.name: one.run.code_hash for one in {s.run.name: s for s in shown}.values()}
    if len(set(versions.values())) > 1:
        yield f"The runs were made by {len(set(versions.values()))} versions of the code."


def _paper(layout: Layout, shown: Sequence[Series], paper: PaperTable) -> Iterable[str]:
    if not paper.numbers:
        return
    targets = ", ".join(name for (name,) in paper.labels(["target"]))
    table = layout.paper if str(layout.paper).startswith("figure") else f"Table {layout.paper}"
    yield (
        f"paper: {CITATION}, {table}; other targets ({targets}), more training, whole benchmarks, K: {paper.depths()}; "
        "neither seeds nor intervals are given. Compare the signs and sizes of gains, not tau."
    )
