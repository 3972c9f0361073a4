"""HumanEval: 164 Python functions to complete from signature and docstring."""

from __future__ import annotations

from lkspec.benchmarks.base import BenchmarkPrompt
from lkspec.benchmarks.sources import FileRow, PublicBenchmark


class HumanEval(PublicBenchmark):
    """Every task as a request to a chat model; the template says how it is asked."""

    folder = "humaneval"
    file_names = ("HumanEval.jsonl", "HumanEval.jsonl.gz")
    origin = "https://github.com/openai/human-eval (data/HumanEval.jsonl.gz)"
    hub_path, hub_config, hub_split = "openai/openai_humaneval", None, "test"

    @staticmethod
    def prompt(row: FileRow, index: int) -> BenchmarkPrompt:
        task = row.text("task_id")  # HumanEval/0
        return BenchmarkPrompt(task, (row.text("prompt"),), None, group=task)
