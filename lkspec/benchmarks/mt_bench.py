"""MT-bench: 80 questions of eight categories, each with a second turn that follows the model's own first answer."""

from __future__ import annotations

from lkspec.benchmarks.base import BenchmarkPrompt
from lkspec.benchmarks.sources import FileRow, PublicBenchmark


class MTBench(PublicBenchmark):
    """Both turns of every question; a question is one group."""

    folder = "mt_bench"
    file_names = ("question.jsonl",)
    origin = "https://github.com/lm-sys/FastChat (fastchat/llm_judge/data/mt_bench/question.jsonl)"
    hub_path, hub_config, hub_split = "HuggingFaceH4/mt_bench_prompts", None, "train"

    @staticmethod
    def prompt(row: FileRow, index: int) -> BenchmarkPrompt:
        hub = "prompt_id" in row.values  # the hub's copy has other field names
        name = f"mt_bench-{row.values['prompt_id'] if hub else row.values.get('question_id')}"
        return BenchmarkPrompt(name, row.texts("prompt" if hub else "turns"), row.text("category"), group=name)
