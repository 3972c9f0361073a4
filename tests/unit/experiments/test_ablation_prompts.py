"""The prompts of the ablations: what is read, dropped and kept apart."""

from __future__ import annotations

import gzip
import importlib.util
import json
import sys
from pathlib import Path

import pytest

from lkspec.data.generation import read_prompts

SCRIPT = Path(__file__).parents[3] / "experiments" / "ablations" / "prompts.py"
FILES = ("train", "heldout_t1", "heldout_t0")
LONG_TURN = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("ablation_prompts", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def write_rows(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def instance(instruction: str, given: str) -> dict:
    return {"instruction": instruction, "instances": [{"input": given, "output": "ANSWER"}]}


@pytest.fixture
def data(tmp_path) -> Path:
    """20 math problems, and a row or two of every other source."""
    prompts, benchmarks = tmp_path / "data" / "prompts", tmp_path / "data" / "benchmarks"
    problems = [{"question": f"Ann has {i} apples\u2028and eats one.", "answer": "ANSWER"} for i in range(20)]
    write_rows(prompts / "gsm8k_train.jsonl", problems)
    write_rows(prompts / "mbpp.jsonl", [{"text": "Sort a list.", "code": "ANSWER", "test_list": ["ANSWER"]}])
    teacher = [("Add them.", "1, 2"), ("Say hello.", "")]
    rows = [{"instruction": text, "input": given, "response": "ANSWER"} for text, given in teacher]
    (prompts / "gpteacher_codegen.json").write_text(json.dumps(rows))
    write_rows(prompts / "arena_hard_v0.1_question.jsonl", [{"turns": [{"content": "\nWhat is SAP?"}]}])
    write_rows(prompts / "self_instruct_seed_tasks.jsonl", [instance("Explain the idiom.", "black sheep")])
    write_rows(prompts / "self_instruct_user_oriented.jsonl", [instance("Name three cities.", "")])
    write_rows(prompts / "vicuna_bench_question.jsonl", [{"turns": ["Why do we dream?"]}])
    turns = ["Tell me of Rome.", LONG_TURN]
    write_rows(benchmarks / "mt_bench" / "question.jsonl", [{"question_id": 1, "category": "math", "turns": turns}])
    write_rows(benchmarks / "gsm8k" / "test.jsonl", [{"question": "Bob bakes 7 cakes in May. How many cakes?"}])
    (benchmarks / "humaneval").mkdir()
    with gzip.open(benchmarks / "humaneval" / "HumanEval.jsonl.gz", "wt") as file:
        file.write(json.dumps({"task_id": "HumanEval/0", "prompt": 'def f(x):\n    """Doubles."""\n'}) + "\n")
    return tmp_path / "data"


def run(script, monkeypatch, data: Path, out: Path, *arguments: str) -> dict[str, list[dict]]:
    """Rows by file."""
    sizes = [] if "--heldout-t1" in arguments else ["--heldout-t1", "6", "--heldout-t0", "3"]
    monkeypatch.setattr(sys, "argv", ["prompts.py", "--data", str(data), "--out", str(out), *sizes, *arguments])
    script.main()
    return {name: rows_of(out / f"{name}.jsonl") for name in (*FILES, "overlaps")}


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def table_row(out: Path, source: str) -> list[str]:
    """The numbers of a source: read, too long, duplicate, (a), (b), train, heldout_t1, heldout_t0."""
    lines = [line.split(" | ") for line in (out / "overlap.md").read_text().splitlines()]
    return next(cells[2:] for cells in lines if cells[0] == f"| {source}")


def add_problems(data: Path, *texts: str) -> None:
    path = data / "prompts" / "gsm8k_train.jsonl"
    write_rows(path, [*rows_of(path), *({"question": text} for text in texts)])


def test_reads_the_prompt_of_every_source_and_never_an_answer(script, monkeypatch, data, tmp_path) -> None:
    files = run(script, monkeypatch, data, tmp_path / "out")
    texts = {row["id"]: row["prompt"] for name in FILES for row in files[name]}
    others = {name: text for name, text in texts.items() if "gsm8k" not in name}
    assert others == {
        "code-mbpp-00001": "Sort a list.",
        "code-gpteacher-00001": "Add them.\n\n1, 2",
        "code-gpteacher-00002": "Say hello.",
        "chat-arena_hard-00001": "What is SAP?",
        "chat-self_instruct_seed-00001": "Explain the idiom.\n\nblack sheep",
        "chat-self_instruct_user-00001": "Name three cities.",
        "chat-vicuna-00001": "Why do we dream?",
    }
    assert len(texts) == 27
    assert not any("ANSWER" in text for text in texts.values())
    assert [len(files[name]) for name in FILES] == [18, 6, 3]


def test_generate_reads_the_files(script, monkeypatch, data, tmp_path) -> None:
    files = run(script, monkeypatch, data, tmp_path / "out")
    prompts = read_prompts([str(tmp_path / "out" / f"{name}.jsonl") for name in FILES])
    assert [prompt.id for prompt in prompts] == [row["id"] for name in FILES for row in files[name]]


def test_twice_the_same_bytes(script, monkeypatch, data, tmp_path) -> None:
    for out in ("first", "second"):
        run(script, monkeypatch, data, tmp_path / out)
    for file in (tmp_path / "first").iterdir():
        assert file.read_bytes() == (tmp_path / "second" / file.name).read_bytes()


def test_the_order_of_a_file_decides_no_split(script, monkeypatch, data, tmp_path) -> None:
    before = run(script, monkeypatch, data, tmp_path / "before")
    path = data / "prompts" / "gsm8k_train.jsonl"
    write_rows(path, rows_of(path)[::-1])
    after = run(script, monkeypatch, data, tmp_path / "after")
    for name in FILES:
        assert {row["prompt"] for row in before[name]} == {row["prompt"] for row in after[name]}


def test_sizes_are_independent_and_limits_are_nested(script, monkeypatch, data, tmp_path) -> None:
    whole = run(script, monkeypatch, data, tmp_path / "whole")
    limited = run(script, monkeypatch, data, tmp_path / "limited", "--limit", "4")
    assert limited == whole | {"train": whole["train"][:4]}
    other = run(script, monkeypatch, data, tmp_path / "other", "--heldout-t1", "10", "--heldout-t0", "3")
    assert other["heldout_t0"] == whole["heldout_t0"]
    assert other["heldout_t1"][:6] == whole["heldout_t1"]


def test_held_out_prompts_come_from_every_source_in_its_share(script, monkeypatch, data, tmp_path) -> None:
    rows = [{"text": f"Sort list {i}.", "code": ""} for i in range(40)]
    write_rows(data / "prompts" / "mbpp.jsonl", rows)
    files = run(script, monkeypatch, data, tmp_path / "out", "--heldout-t1", "33", "--heldout-t0", "20")
    shares = [sum("mbpp" in row["id"] for row in files[name]) / len(files[name]) for name in FILES]
    assert shares == pytest.approx([40 / 66] * 3, abs=0.1)


def test_duplicates_differ_in_signs_and_case_only(script, monkeypatch, data, tmp_path) -> None:
    add_problems(data, "ann has 3 apples, and eats ONE!", "Ann has 33 apples and eats one.")
    run(script, monkeypatch, data, tmp_path / "out")
    assert table_row(tmp_path / "out", "gsm8k_train")[:5] == ["22", "0", "1", "0", "0"]


def test_long_prompts_are_counted(script, monkeypatch, data, tmp_path) -> None:
    add_problems(data, "a" * 50, "b" * 51)
    files = run(script, monkeypatch, data, tmp_path / "out", "--max-chars", "50")
    assert table_row(tmp_path / "out", "gsm8k_train")[:5] == ["22", "1", "0", "0", "0"]
    assert any(row["prompt"] == "a" * 50 for name in FILES for row in files[name])


@pytest.mark.parametrize(
    ("text", "by", "benchmark_id", "shared"),
    [
        ("tell me of ROME", "(a) whole text", "mt_bench-1", "tell me of rome"),
        ("Def f(x): doubles", "(a) whole text", "HumanEval/0", "def f x doubles"),
        (
            f"Now count: {LONG_TURN.removesuffix(' fourteen').upper()}, and stop.",
            "(b) 13-gram",
            "mt_bench-1",
            LONG_TURN.removesuffix(" fourteen"),
        ),
        ("Two, three, four?", "(b) 13-gram", "mt_bench-1", "two three four"),
        ("Please, tell me of Rome.", "(b) 13-gram", "mt_bench-1", "tell me of rome"),
        (
            f"{'so ' * 20} Bob bakes 7 cakes in May. How many cakes?",
            "(b) 13-gram",
            "gsm8k-0",
            "bob bakes 7 cakes in may how many cakes",
        ),
    ],
    ids=["same", "same-code", "13-gram", "short-prompt-inside", "short-turn-inside", "short-turn-inside-long"],
)
def test_drops_and_shows_what_a_benchmark_has(
    script, monkeypatch, data, tmp_path, text, by, benchmark_id, shared
) -> None:
    add_problems(data, text)
    files = run(script, monkeypatch, data, tmp_path / "out")
    assert files["overlaps"] == [
        {"id": "math-gsm8k_train-00021", "by": by, "benchmark_id": benchmark_id, "shared": shared, "prompt": text}
    ]
    assert text not in [row["prompt"] for name in FILES for row in files[name]]
    counts = ["1", "0"] if by.startswith("(a)") else ["0", "1"]
    assert table_row(tmp_path / "out", "gsm8k_train")[:5] == ["21", "0", "0", *counts]


@pytest.mark.parametrize(
    "text",
    [
        f"{LONG_TURN.replace('seven', 'eleven')} and more",
        "Twenty-two, three, four?",
        "How many cakes in May bakes Bob?",
    ],
    ids=["12 words at most", "not its words", "another order"],
)
def test_keeps_what_no_benchmark_has(script, monkeypatch, data, tmp_path, text) -> None:
    add_problems(data, text)
    files = run(script, monkeypatch, data, tmp_path / "out")
    assert files["overlaps"] == []
    assert text in [row["prompt"] for name in FILES for row in files[name]]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("prompts/mbpp.jsonl", None, "expected mbpp.jsonl"),
        (
            "prompts/mbpp.jsonl",
            '{"question": "?"}\n',
            "mbpp.jsonl:1: expected a row of mbpp, got one with ['question']",
        ),
        ("prompts/mbpp.jsonl", '{"text": " "}\n', "mbpp.jsonl:1: expected a row of mbpp, its prompt is empty"),
        ("prompts/vicuna_bench_question.jsonl", '{"turns": []}\n', "expected a row of vicuna"),
        ("prompts/gpteacher_codegen.json", "{}", "expected a list of JSON objects"),
        ("prompts/gpteacher_codegen.json", "[", "gpteacher_codegen.json: not JSON"),
        ("benchmarks/gsm8k/test.jsonl", None, "gsm8k: its file was not found"),
    ],
)
def test_bad_files_are_one_line(script, monkeypatch, data, tmp_path, capsys, file, content, message) -> None:
    if content is None:
        (data / file).unlink()
    else:
        (data / file).write_text(content)
    with pytest.raises(SystemExit) as error:
        run(script, monkeypatch, data, tmp_path / "out")
    assert error.value.code == 2
    printed = capsys.readouterr().err
    assert message in printed.splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--heldout-t1", "24", "--heldout-t0", "3"), "take all of the 27 prompts"),
        (("--heldout-t1", "0"), "--heldout-t1: expected at least 1, got 0"),
        (("--limit", "0"), "--limit: expected at least 1, got 0"),
    ],
)
def test_bad_sizes(script, monkeypatch, data, tmp_path, capsys, arguments, message) -> None:
    with pytest.raises(SystemExit):
        run(script, monkeypatch, data, tmp_path / "out", *arguments)
    assert message in capsys.readouterr().err


def test_a_data_folder_must_be_named(script, monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.delenv("LKSPEC_DATA", raising=False)
    monkeypatch.setattr(sys, "argv", ["prompts.py", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit):
        script.main()
    assert "give --data or set LKSPEC_DATA" in capsys.readouterr().err


def runs_of_13(texts: list[str]) -> set[tuple[str, ...]]:
    return {run for text in texts for run in zip(*(text.split()[i:] for i in range(13)))}  # noqa: B905 ends with the last


@pytest.mark.slow
def test_real_files(script, monkeypatch, benchmark_data, tmp_path) -> None:
    sizes = ("--heldout-t1", "1200", "--heldout-t0", "400")
    files = run(script, monkeypatch, benchmark_data, tmp_path / "out", *sizes)
    assert [len(files[name]) for name in FILES] == [12_352, 1_200, 400]
    words = [script.normalised(row["prompt"]) for name in FILES for row in files[name]]
    assert len(set(words)) == len(words)
    benchmarks = [make(data_dir=str(benchmark_data)) for make in (script.MTBench, script.HumanEval, script.GSM8K)]
    turns = [script.normalised(t) for benchmark in benchmarks for prompt in benchmark.prompts() for t in prompt.turns]
    assert not set(words) & set(turns)
    assert not runs_of_13(words) & runs_of_13(turns)
    overlaps = {row["id"]: row["by"] for row in files["overlaps"]}
    assert len(overlaps) == 6
    assert overlaps["chat-vicuna-00077"] == "(a) whole text"  # MT-bench's travel blog post about Hawaii
