"""MT-bench, HumanEval and GSM8K from small stand-ins of their files, from the hub's form, and from the real files."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import datasets
import pytest

from lkspec.benchmarks.gsm8k import GSM8K
from lkspec.benchmarks.humaneval import HumanEval
from lkspec.benchmarks.mt_bench import MTBench

MT_BENCH_ROWS = [
    {"question_id": 81, "category": "writing", "turns": ["Write a post.", "Rewrite it."]},
    {"question_id": 82, "category": "math", "turns": ["1 + 1?", "Times 3?"]},
]
HUMANEVAL_ROWS = [{"task_id": f"HumanEval/{i}", "prompt": f"def f{i}():\n", "test": "no"} for i in range(3)]
GSM8K_ROWS = [{"question": f"How many {i}?", "answer": "#### 1"} for i in range(4)]


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(params=["", "benchmarks"], ids=["direct", "under-benchmarks"])
def folder(request, tmp_path) -> Path:
    """A data folder with all three, in both of the layouts that are read."""
    for name in ("mt_bench", "humaneval", "gsm8k"):
        (tmp_path / request.param / name).mkdir(parents=True)
    (tmp_path / request.param / "mt_bench" / "question.jsonl").write_text(lines(MT_BENCH_ROWS))
    with gzip.open(tmp_path / request.param / "humaneval" / "HumanEval.jsonl.gz", "wt") as file:
        file.write(lines(HUMANEVAL_ROWS))
    (tmp_path / request.param / "gsm8k" / "test.jsonl").write_text(lines(GSM8K_ROWS))
    return tmp_path


@pytest.fixture
def no_data(monkeypatch):
    monkeypatch.delenv("LKSPEC_DATA", raising=False)


@pytest.mark.usefixtures("no_data")
def test_mt_bench_asks_both_turns(folder):
    prompts = MTBench(data_dir=str(folder)).prompts()
    assert [prompt.id for prompt in prompts] == ["mt_bench-81", "mt_bench-82"]
    assert prompts[0].turns == ("Write a post.", "Rewrite it.")
    assert [prompt.category for prompt in prompts] == ["writing", "math"]
    assert [prompt.group for prompt in prompts] == [prompt.id for prompt in prompts]


def test_humaneval_from_the_environment(folder, monkeypatch):
    monkeypatch.setenv("LKSPEC_DATA", str(folder))
    prompts = HumanEval(template="Complete:\n```python\n{prompt}```").prompts()
    assert [prompt.id for prompt in prompts] == ["HumanEval/0", "HumanEval/1", "HumanEval/2"]
    assert prompts[1].turns == ("Complete:\n```python\ndef f1():\n```",)


def test_named_folder_wins_over_the_environment(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("LKSPEC_DATA", str(tmp_path / "elsewhere"))
    assert len(HumanEval(data_dir=str(folder)).prompts()) == 3


def test_humaneval_unzipped(tmp_path):
    (tmp_path / "humaneval").mkdir()
    (tmp_path / "humaneval" / "HumanEval.jsonl").write_text(lines(HUMANEVAL_ROWS[:2]))
    assert len(HumanEval(data_dir=str(tmp_path)).prompts()) == 2


def test_gsm8k_ids_are_places_in_the_file(folder):
    prompts = GSM8K(data_dir=str(folder), num_prompts=2, template="{prompt} Go.").prompts()
    assert [prompt.id for prompt in prompts] == ["gsm8k-0", "gsm8k-2"]
    assert prompts[1].turns == ("How many 2? Go.",)


@pytest.mark.parametrize(
    ("make", "file", "origin", "hub"),
    [
        (MTBench, "mt_bench/question.jsonl", "lm-sys/FastChat", "HuggingFaceH4/mt_bench_prompts"),
        (HumanEval, "humaneval/HumanEval.jsonl", "openai/human-eval", "openai/openai_humaneval"),
        (GSM8K, "gsm8k/test.jsonl", "openai/grade-school-math", "openai/gsm8k"),
    ],
)
@pytest.mark.usefixtures("no_data")
def test_missing_file_says_where_and_how(make, file, origin, hub, tmp_path):
    with pytest.raises(ValueError, match="not found") as error:
        make(data_dir=str(tmp_path))
    message = str(error.value)
    for part in (f"{tmp_path}/{file}", f"{tmp_path}/benchmarks/{file}", f"https://github.com/{origin}", hub):
        assert part in message
    assert "benchmark.data_dir=<folder>" in message
    assert "benchmark.source=hub" in message
    with pytest.raises(ValueError, match=r"neither benchmark\.data_dir nor LKSPEC_DATA is set"):
        make()


def test_unknown_source():
    with pytest.raises(ValueError, match=r"benchmark\.source: expected files or hub, got 'web'"):
        MTBench(source="web")


HUB_ROWS = {
    "HuggingFaceH4/mt_bench_prompts": [
        {"prompt_id": row["question_id"], "category": row["category"], "prompt": row["turns"], "reference": []}
        for row in MT_BENCH_ROWS
    ],
    "openai/openai_humaneval": HUMANEVAL_ROWS,
    "openai/gsm8k": GSM8K_ROWS,
}


@pytest.mark.parametrize(
    ("make", "config", "split"), [(MTBench, None, "train"), (HumanEval, None, "test"), (GSM8K, "main", "test")]
)
def test_hub_gives_the_same_prompts_as_the_file(make, config, split, folder, monkeypatch):
    def load_dataset(path, name, *, split):
        asked.append((name, split))
        return HUB_ROWS[path]

    asked: list[tuple] = []
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    from_hub, from_file = make(source="hub"), make(data_dir=str(folder))
    assert from_hub.prompts() == from_file.prompts()
    assert from_hub.protocol() == from_file.protocol()
    assert asked == [(config, split)]


def test_unreachable_hub_is_an_error(monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"openai/gsm8k could not be read \(offline\).*benchmark\.source=files"):
        GSM8K(source="hub")


@pytest.mark.parametrize(
    ("make", "file", "text", "message"),
    [
        (
            MTBench,
            "mt_bench/question.jsonl",
            '{"question_id": 1, "category": "c"}',
            "list of texts in 'turns', got None",
        ),
        (HumanEval, "humaneval/HumanEval.jsonl", '{"task_id": "a", "prompt": 3}', "a text in 'prompt', got 3"),
        (GSM8K, "gsm8k/test.jsonl", '{"question": " "}', "a text in 'question', got ' '"),
        (GSM8K, "gsm8k/test.jsonl", "{", r"not JSON \("),
        (GSM8K, "gsm8k/test.jsonl", "[1]", r"expected a JSON object, got \[1\]"),
    ],
)
def test_bad_row_is_named(make, file, text, message, tmp_path):
    path = tmp_path / file
    path.parent.mkdir()
    path.write_text("\n" + text + "\n")
    with pytest.raises(ValueError, match=rf"{path.name}:2: .*{message}"):
        make(data_dir=str(tmp_path))


def test_empty_file(tmp_path):
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "test.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"test\.jsonl: the file has no rows"):
        GSM8K(data_dir=str(tmp_path))


@pytest.mark.parametrize(("make", "count", "turns"), [(MTBench, 80, 2), (HumanEval, 164, 1), (GSM8K, 1319, 1)])
def test_real_files(make, count, turns, benchmark_data):
    prompts = make(data_dir=str(benchmark_data)).prompts()
    assert len(prompts) == count
    assert {len(prompt.turns) for prompt in prompts} == {turns}
    assert len({prompt.turns for prompt in prompts}) == count


def test_few_prompts_of_mt_bench_cover_every_category(benchmark_data):
    chosen = MTBench(data_dir=str(benchmark_data), num_prompts=8).prompts()
    assert len({prompt.category for prompt in chosen}) == 8
