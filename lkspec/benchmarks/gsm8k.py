"""GSM8K: the 1,319 grade-school word problems of the test split (its train split is for training)."""

from __future__ import annotations

from lkspec.benchmarks.base import Benchmark, BenchmarkPrompt
from lkspec.benchmarks.sources import Upstream

UPSTREAM = Upstream(
    folder="gsm8k",
    file_names=("test.jsonl",),
    origin="https://github.com/openai/grade-school-math (grade_school_math/data/test.jsonl)",
    hub_path="openai/gsm8k",
    hub_config="main",
    hub_split="test",
)


class GSM8K(Benchmark):
    """Every test problem, without examples; the template asks for the steps.

    Raises:
        ValueError: the file is not there or a row is not GSM8K's.
    """

    def __init__(
        self,
        *,
        name: str = "gsm8k",
        source: str = "files",
        data_dir: str | None = None,
        num_prompts: int | None = None,
        template: str = "{prompt}",
        system_prompt: str | None = None,
        max_new_tokens: int = 512,
    ) -> None:
        questions = [row.text("question") for row in UPSTREAM.rows(source=source, data_dir=data_dir)]
        super().__init__(
            # The file names no ids; a question's place in it is the same in every copy.
            [BenchmarkPrompt(f"gsm8k-{i}", (text,), None, group=f"gsm8k-{i}") for i, text in enumerate(questions)],
            name=name,
            num_prompts=num_prompts,
            template=template,
            system_prompt=system_prompt,
            max_new_tokens=max_new_tokens,
        )
