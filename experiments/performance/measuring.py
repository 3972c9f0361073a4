"""How the benchmarks here measure: interleaved times, and memory by counting every allocation.

Times of different runs on a shared machine differ by more than what is under study, so contestants take turns and the
minimum of the rounds counts. Peak memory is not read off the process but counted, allocation by allocation, by torch's
own profiler, and is therefore exact and repeatable.
"""

from __future__ import annotations

import csv
import gc
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

MIB = 2**20
MIN_ROUNDS = 7


def interleaved_seconds(
    contestants: Mapping[str, Callable[[], object]], *, rounds: int = MIN_ROUNDS
) -> dict[str, float]:
    """Minimum wall time of each contestant, in seconds; all take a turn a round, and a first round does not count."""
    best = dict.fromkeys(contestants, float("inf"))
    for number in range(rounds + 1):
        for name, contestant in contestants.items():
            gc.collect()
            start = time.perf_counter()
            contestant()
            seconds = time.perf_counter() - start
            if number > 0:
                best[name] = min(best[name], seconds)
    return best


def peak_bytes(work: Callable[[], object]) -> int:
    """Most bytes of CPU tensors alive at once during ``work``, above those alive before it."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = work()
    del result
    live = peak = 0
    for event in _memory_events(profiled):
        live += event
        peak = max(peak, live)
    return peak


def _memory_events(profiled: profile) -> list[int]:
    """Bytes allocated (positive) and freed (negative), in order."""
    assert profiled.profiler is not None
    results = profiled.profiler.kineto_results
    assert results is not None
    events = [event for event in results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def print_table(title: str, rows: Sequence[Mapping[str, object]]) -> None:
    """Aligned columns, with the keys of the first row as their heads."""
    cells = [list(rows[0]), *([format_cell(row.get(key, "")) for key in rows[0]] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    print(f"\n{title}")
    for line in cells:
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def format_cell(value: object) -> str:
    """Numbers with four significant digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """One file a benchmark, with the machine's facts left to its README."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, keys, lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: format_cell(value) for key, value in row.items()} for row in rows)
