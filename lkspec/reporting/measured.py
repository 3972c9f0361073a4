"""Tables of what a command has just measured: acceptance lengths, a walk by sharpness, the throughput of an engine."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from rich.text import Text

from lkspec.measure.metrics import paired_difference_interval
from lkspec.reporting.terminal import console, say, table
from lkspec.runs.folder import RunFolder
from lkspec.runs.rows import ResultRow, ThroughputRow

_CPU = "measured on a CPU: no decision about serving should rest on these figures"


def print_results(rows: Sequence[ResultRow], *, title: str) -> None:
    """A table of measurements: tau with its 95 % interval, acceptance per position, speed.

    ``s`` is the sharpness of q, where any is not as trained; ``whole rounds`` is tau over the rounds whose K proposals
    lie inside the text, the rule that the walk follows.
    """
    sharpened = any(row.sharpness != 1 for row in rows)
    setting = ("T", "K", *(["s"] if sharpened else []))
    measured = ("tau", "95 % interval", "whole rounds", "walk", "accepted at 1..K", "prompts", "tokens/s")
    with_speedup = any(row.speedup is not None for row in rows)
    cells = [
        [
            row.benchmark,
            f"{row.temperature:g}",
            str(row.num_draft_tokens),
            *([f"{row.sharpness:g}"] if sharpened else []),
            f"{row.tau:.3f}",
            f"{row.low:.3f} - {row.high:.3f}",
            _shown(row.tau_whole_rounds, ".3f"),
            _shown(row.walk_tau, ".3f"),
            " ".join(f"{share:.2f}" for share in row.alpha),
            str(row.num_prompts),
            _shown(row.tokens_per_second, ".1f"),
            *([f"{row.speedup:.2f}x" if row.speedup else "-"] if with_speedup else []),
        ]
        for row in rows
    ]
    names = ("benchmark", *setting, *measured, *(["speed-up"] if with_speedup else []))
    table(title, names, cells, left=["benchmark"])


def _shown(value: float | None, form: str) -> str:
    """A dash where nothing was measured: filtered sampling, for one, has no walk."""
    return "-" if value is None or math.isnan(value) else format(value, form)


def print_sharpness(folder: RunFolder, keys: Collection[str], num_draft_tokens: int) -> None:
    """tau of some answers by temperature and every sharpness walked so far, and its gain over q as trained.

    Gains are bold where their interval excludes 0.
    """
    counts: dict[tuple[float, float], dict[str, tuple[float, float]]] = {}
    walked = folder.read_walk_table()
    for row in [] if walked is None else walked.to_pylist():
        if row["depth"] == num_draft_tokens and row["key"] in keys:
            place = counts.setdefault((row["temperature"], row["sharpness"]), {})
            place[row["key"]] = (row["accepted"], row["rounds"])
    temperatures, powers = ({key[place]: None for key in sorted(counts)} for place in (0, 1))
    names = ["s", *(f"T = {temperature:g}" for temperature in temperatures)]
    cells = [[f"{power:g}", *(_cell(counts, place, power) for place in temperatures)] for power in sorted(powers)]
    console.print(f"walk with q^s, renormalised, in place of q, K = {num_draft_tokens}", highlight=False)
    table(None, names, [[Text.from_markup(text) for text in row] for row in cells])
    say(
        "`lkspec report value=walk rows=[draft,objective,sharpness]` joins runs; "
        "`lkspec export sharpness=s` writes such a draft"
    )


def _cell(
    counts: dict[tuple[float, float], dict[str, tuple[float, float]]], temperature: float, sharpness: float
) -> str:
    here, plain = counts.get((temperature, sharpness)), counts.get((temperature, 1.0))
    if here is None:
        return "as 1" if temperature == 0 else "-"
    rounds = sum(number for _, number in here.values())
    tau = f"{1 + sum(accepted for accepted, _ in here.values()) / rounds:.3f}" if rounds > 0 else "-"
    if plain is None or sharpness == 1:
        return tau
    gain, low, high = paired_difference_interval(here, plain, confidence=0.95)
    if math.isnan(low):
        return f"{tau} {gain:+.3f}"
    told = f"{gain:+.3f}" if low <= 0 <= high else f"[bold]{gain:+.3f}[/bold]"
    return f"{tau} {told} ({low:+.3f} to {high:+.3f})"


def comparable(rows: Sequence[ThroughputRow], newest: Sequence[ThroughputRow]) -> list[ThroughputRow]:
    """Rows that differ from some of the newest in K and concurrency only, so that several servers make one table."""
    settings = {row.setting for row in newest}
    fitting = [row for row in rows if row.setting in settings]
    return sorted(fitting, key=lambda row: (row.concurrency, row.num_draft_tokens))


def speedups(rows: Sequence[ThroughputRow]) -> dict[tuple[int, int], float]:
    """(concurrency, K) -> tokens per second over those without drafting, where both are known."""
    alone = {row.concurrency: row.tokens_per_second for row in rows if row.num_draft_tokens == 0}
    return {
        (row.concurrency, row.num_draft_tokens): row.tokens_per_second / alone[row.concurrency]
        for row in rows
        if row.num_draft_tokens > 0 and row.concurrency in alone
    }


def advice(rows: Sequence[ThroughputRow]) -> list[str]:
    """A line per concurrency: the best K, and where drafting loses."""
    lines = []
    gains = speedups(rows)
    for concurrency in sorted({row.concurrency for row in rows}):
        here = {depths: gain for (number, depths), gain in gains.items() if number == concurrency}
        if not here:
            alone = any(row.num_draft_tokens == 0 and row.concurrency == concurrency for row in rows)
            missing = "with a draft" if alone else "without drafting (K=0)"
            lines.append(f"concurrency {concurrency}: nothing to compare with, as nothing was measured {missing} yet")
            continue
        best = max(here, key=lambda depths: here[depths])
        losing = ", ".join(f"K={depths} ({gain:.2f}x)" for depths, gain in sorted(here.items()) if gain < 1)
        if here[best] < 1:
            lines.append(f"drafting loses at concurrency {concurrency}: {here[best]:.2f}x with K={best} at best")
        else:
            lines.append(
                f"best K at concurrency {concurrency}: {best} ({here[best]:.2f}x)"
                + (f"; drafting loses with {losing}" if losing else "")
            )
    return lines


def print_throughput(rows: Sequence[ThroughputRow]) -> None:
    """A table of rows of one setting, the advice, and what a measurement on a CPU is worth."""
    first = rows[0]
    title = f"throughput of {first.engine} on {first.hardware}, {first.num_requests} requests, T={first.temperature:g}"
    names = ("concurrency", "K", "tokens", "output tokens/s", "median ms/token", "p95 ms/token", "speed-up")
    gains = speedups(rows)
    cells = []
    for row in rows:
        gain = gains.get((row.concurrency, row.num_draft_tokens))
        cells.append(
            [
                str(row.concurrency),
                str(row.num_draft_tokens) if row.num_draft_tokens else "0 (no draft)",
                str(row.num_tokens),
                f"{row.tokens_per_second:.1f}",
                f"{row.median_ms_per_token:.1f}",
                f"{row.p95_ms_per_token:.1f}",
                "-" if gain is None else f"{gain:.2f}x",
            ]
        )
    table(title, names, cells)
    for line in advice(rows):
        say(line)
    if first.hardware == "CPU":
        console.print(_CPU, style="yellow", soft_wrap=True)
