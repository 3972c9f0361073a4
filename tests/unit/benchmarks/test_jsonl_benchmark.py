from __future__ import annotations

import gzip
import json

import pytest

from lkspec.benchmarks.jsonl import Jsonl


def written(tmp_path, *rows) -> str:
    path = tmp_path / "traffic.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def test_three_forms(tmp_path):
    path = written(
        tmp_path,
        {"prompt": "Hi", "id": 7, "category": "short", "group": "customer-1"},
        {"turns": ["One", "Two"]},
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "A"},
                {"role": "assistant", "content": "recorded answer"},
                {"role": "user", "content": "B"},
                {"role": "assistant", "content": "another"},
            ]
        },
    )
    benchmark = Jsonl(path=path, system_prompt="common")
    first, second, third = benchmark.prompts()
    assert benchmark.name == "traffic"
    assert (first.id, first.turns, first.category, first.group) == ("7", ("Hi",), "short", "customer-1")
    assert (second.id, second.turns, second.group) == ("traffic-1", ("One", "Two"), "traffic-1")
    assert (third.turns, third.system_prompt) == (("A", "B"), "Be brief.")
    assert first.system_prompt == second.system_prompt == "common"


def test_gzipped_file_and_own_name(tmp_path):
    with gzip.open(tmp_path / "day.jsonl.gz", "wt") as file:
        file.write('{"prompt": "é"}\n')
    assert Jsonl(path=str(tmp_path / "day.jsonl.gz")).name == "day"
    named = Jsonl(path=str(tmp_path / "day.jsonl.gz"), name="monday", template="Q: {prompt}")
    assert named.name == "monday"
    assert named.prompts()[0].turns == ("Q: é",)


USER = {"role": "user", "content": "A"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "Hi"}, r"expected one of the fields prompt, turns, messages, got \['text'\]"),
        ({"prompt": "Hi", "turns": ["Hi"]}, r"expected one of the fields .* got \['prompt', 'turns'\]"),
        ({"prompt": ""}, "expected a text in 'prompt', got ''"),
        ({"prompt": 3}, "expected a text in 'prompt', got 3"),
        ({"turns": []}, r"expected a list of texts in 'turns', got \[\]"),
        ({"turns": "Hi"}, "expected a list of texts in 'turns', got 'Hi'"),
        ({"turns": ["Hi", None]}, "expected a text in 'turns', got None"),
        ({"messages": "Hi"}, "'messages' must be a list of objects"),
        ({"messages": ["Hi"]}, "'messages' must be a list of objects"),
        ({"messages": []}, "'messages' has no message of the user"),
        ({"messages": [USER, {"role": "tool", "content": "x"}]}, r"messages\[1\] has role 'tool'"),
        ({"messages": [USER, {"role": "system", "content": "x"}]}, r"messages\[1\] has role 'system'.*only first"),
        ({"messages": [{"role": "user", "content": [1]}]}, r"messages\[0\]: expected a text in 'content', got \[1\]"),
        ("{", r"not JSON \("),
        ('"Hi"', "expected a JSON object, got 'Hi'"),
    ],
)
def test_bad_row_is_named_with_its_line(tmp_path, row, message):
    path = written(tmp_path, {"prompt": "good"}, row)
    with pytest.raises(ValueError, match=rf"traffic\.jsonl:2: {message}"):
        Jsonl(path=path)


def test_same_id_twice(tmp_path):
    with pytest.raises(ValueError, match="'a' is repeated"):
        Jsonl(path=written(tmp_path, {"prompt": "x", "id": "a"}, {"prompt": "y", "id": "a"}))


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match=r"path must name a JSONL file of prompts, found none at .*nowhere\.jsonl"):
        Jsonl(path=str(tmp_path / "nowhere.jsonl"))
