"""Three small suites that come with the package: chat (two turns), code and math, written for this project.

They need no download and share no text with the public benchmarks, so that a first run measures something real. Their
numbers are not comparable with published ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Unpack

from lkspec.benchmarks.base import Asking, Benchmark, BenchmarkPrompt
from lkspec.benchmarks.sources import FileRow, read_rows

SUITES = ("chat", "code", "math")


class Mini(Benchmark):
    """One suite, by default under the name ``mini_<suite>``.

    Raises:
        ValueError: an unknown suite.
    """

    def __init__(self, *, suite: str, name: str | None = None, **asking: Unpack[Asking]) -> None:
        if suite not in SUITES:
            raise ValueError(f"benchmark mini: expected a suite of {', '.join(SUITES)}, got {suite!r}")
        rows = read_rows(Path(__file__).parent / "mini" / f"{suite}.jsonl")
        super().__init__([_prompt(row) for row in rows], name=name or f"mini_{suite}", **asking)


def _prompt(row: FileRow) -> BenchmarkPrompt:
    turns = row.texts("turns") if "turns" in row.values else (row.text("prompt"),)
    return BenchmarkPrompt(row.text("id"), turns, row.values.get("category"), group=row.text("id"))
