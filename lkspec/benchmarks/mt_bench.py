"""MT-bench: 80 questions of eight categories, each with a second turn that follows the model's own first answer."""

from __future__ import annotations

from lkspec.benchmarks.base import Benchmark, BenchmarkPrompt
from lkspec.benchmarks.sources import Row, Upstream

UPSTREAM = Upstream(
    folder="mt_bench",
    file_names=("question.jsonl",),
    origin="https://github.com/lm-sys/FastChat (fastchat/llm_judge/data/mt_bench/question.jsonl)",
    hub_path="HuggingFaceH4/mt_bench_prompts",
    hub_config=None,
    hub_split="train",
)


class MTBench(Benchmark):
    """Both turns of every question; a question is one group.

    Raises:
        ValueError: the file is not there or a row is not MT-bench's.
    """

    def __init__(
        self,
        *,
        name: str = "mt_bench",
        source: str = "files",
        data_dir: str | None = None,
        num_prompts: int | None = None,
        template: str = "{prompt}",
        system_prompt: str | None = None,
        max_new_tokens: int = 1024,
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
    hub = "prompt_id" in row.values  # the hub's copy has other field names
    prompt_id = f"mt_bench-{row.values['prompt_id'] if hub else row.values.get('question_id')}"
    turns = row.texts("prompt" if hub else "turns")
    return BenchmarkPrompt(prompt_id, turns, row.text("category"), group=prompt_id)
