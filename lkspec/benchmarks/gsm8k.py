"""GSM8K: the 1,319 grade-school word problems of the test split (its train split is for training)."""

from __future__ import annotations

from lkspec.benchmarks.base import BenchmarkPrompt
from lkspec.benchmarks.sources import FileRow, PublicBenchmark


class GSM8K(PublicBenchmark):
    """Every test problem, without examples; the template asks for the steps."""

    folder = "gsm8k"
    file_names = ("test.jsonl",)
    origin = "https://github.com/openai/grade-school-math (grade_school_math/data/test.jsonl)"
    hub_path, hub_config, hub_split = "openai/gsm8k", "main", "test"

    @staticmethod
    def prompt(row: FileRow, index: int) -> BenchmarkPrompt:
        name = f"gsm8k-{index}"  # the file names no ids; a question's place in it is the same in every copy
        return BenchmarkPrompt(name, (row.text("question"),), None, group=name)
