"""HumanEval: 164 Python functions to complete from signature and docstring."""

from __future__ import annotations

from lkspec.benchmarks.base import Benchmark, BenchmarkPrompt
from lkspec.benchmarks.sources import Row, Upstream

UPSTREAM = Upstream(
    folder="humaneval",
    file_names=("HumanEval.jsonl", "HumanEval.jsonl.gz"),
    origin="https://github.com/openai/human-eval (data/HumanEval.jsonl.gz)",
    hub_path="openai/openai_humaneval",
    hub_config=None,
    hub_split="test",
)


class HumanEval(Benchmark):
    """Every task as a request to a chat model; the template says how it is asked.

    Raises:
        ValueError: the file is not there or a row is not HumanEval's.
    """

    def __init__(
        self,
        *,
        name: str = "humaneval",
        source: str = "files",
        data_dir: str | None = None,
        num_prompts: int | None = None,
        template: str = "{prompt}",
        system_prompt: str | None = None,
        max_new_tokens: int = 512,
    ) -> None:
        super().__init__(
            [_prompt(row) for row in UPSTREAM.rows(source=source, data_dir=data_dir)],
            name=name,
            num_prompts=num_prompts,
            template=template,
            system_prompt=system_prompt,
            max_new_tokens=max_new_tokens,
        )


def _prompt(row: Row) -> BenchmarkPrompt:
    task = row.text("task_id")  # HumanEval/0
    return BenchmarkPrompt(task, (row.text("prompt"),), None, group=task)
