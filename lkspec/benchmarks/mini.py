"""Three small suites that come with the package: chat (two turns), code and math, written for this project.

They need no download and share no text with the public benchmarks, so that a first run measures something real. Their
numbers are not comparable with published ones.
"""

from __future__ import annotations

from pathlib import Path

from lkspec.benchmarks.base import Benchmark, BenchmarkPrompt
from lkspec.benchmarks.sources import Row, read_jsonl

SUITES = ("chat", "code", "math")


class Mini(Benchmark):
    """One suite, by default under the name ``mini_<suite>``.

    Raises:
        ValueError: an unknown suite.
    """

    def __init__(
        self,
        *,
        suite: str,
        name: str | None = None,
        num_prompts: int | None = None,
        template: str = "{prompt}",
        system_prompt: str | None = None,
        max_new_tokens: int = 256,
    ) -> None:
        if suite not in SUITES:
            raise ValueError(f"benchmark mini: expected a suite of {', '.join(SUITES)}, got {suite!r}")
        super().__init__(
            [_prompt(row) for row in read_jsonl(Path(__file__).parent / "mini" / f"{suite}.jsonl")],
            name=name or f"mini_{suite}",
            num_prompts=num_prompts,
            template=template,
            system_prompt=system_prompt,
            max_new_tokens=max_new_tokens,
        )


def _prompt(row: Row) -> BenchmarkPrompt:
    turns = row.texts("turns") if "turns" in row.values else (row.text("prompt"),)
    return BenchmarkPrompt(row.text("id"), turns, row.values.get("category"), group=row.text("id"))
