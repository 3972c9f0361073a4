from __future__ import annotations

import hashlib
import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lkspec.benchmarks.base import Benchmark, BenchmarkPrompt


def rows(count: int) -> list[BenchmarkPrompt]:
    return [BenchmarkPrompt(f"p{i}", (f"text {i}",), None, f"p{i}") for i in range(count)]


def benchmark(given_rows: list[BenchmarkPrompt], **changes) -> Benchmark:
    arguments = {
        "name": "b",
        "num_prompts": None,
        "template": "{prompt}",
        "system_prompt": None,
        "max_new_tokens": 9,
    }
    return Benchmark(given_rows, **{**arguments, **changes})


@given(total=st.integers(1, 200), count=st.integers(1, 250))
def test_subset_is_spread_evenly(total, count):
    chosen = [int(p.id[1:]) for p in benchmark(rows(total), num_prompts=count).prompts()]
    assert len(chosen) == min(count, total)
    assert chosen == sorted(set(chosen))
    gaps = [after - before for before, after in pairwise([*chosen, total])]
    assert chosen[0] == 0
    assert max(gaps) - min(gaps) <= 1  # every stretch of the file is represented alike


def test_all_prompts_by_default():
    assert benchmark(rows(7)).prompts() == tuple(rows(7))


def test_template_is_put_around_every_turn():
    row = BenchmarkPrompt("a", ("x {prompt}", "y"), None, "a")
    made = benchmark([row], template="Answer in \\boxed{}: {prompt}!").prompts()[0]
    assert made.turns == ("Answer in \\boxed{}: x {prompt}!", "Answer in \\boxed{}: y!")


def test_own_system_prompt_wins():
    own = BenchmarkPrompt("a", ("x",), None, "a", system_prompt="own")
    none = BenchmarkPrompt("b", ("x",), None, "b")
    made = benchmark([own, none], system_prompt="common").prompts()
    assert [prompt.system_prompt for prompt in made] == ["own", "common"]


def test_protocol_identifies_the_prompts():
    made = benchmark(rows(4), num_prompts=2, template="Q: {prompt}", system_prompt="s", max_new_tokens=5)
    texts = json.dumps([["s", "Q: text 0"], ["s", "Q: text 2"]])
    assert made.protocol() == {
        "name": "b",
        "num_prompts": 2,
        "prompts_sha256": hashlib.sha256(texts.encode()).hexdigest()[:16],
        "template": "Q: {prompt}",
        "system_prompt": "s",
        "max_new_tokens": 5,
    }


@pytest.mark.parametrize(
    "change",
    [
        {"num_prompts": 3},
        {"template": "Q: {prompt}"},
        {"system_prompt": "s"},
        {"max_new_tokens": 8},
        {"name": "c"},
    ],
)
def test_protocol_differs_with_every_argument(change):
    assert benchmark(rows(4), **change).protocol() != benchmark(rows(4)).protocol()


def test_protocol_sees_texts():
    changed = [*rows(3), BenchmarkPrompt("p3", ("text 3.",), None, "p3")]
    assert benchmark(changed).protocol() != benchmark(rows(4)).protocol()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_prompts": 0}, "num_prompts must be at least 1, got 0; null uses all 4"),
        ({"template": "no place"}, r"template must contain \{prompt\}, got 'no place'"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    with pytest.raises(ValueError, match=f"benchmark b: {message}"):
        benchmark(rows(4), **change)


def test_repeated_ids_are_refused():
    with pytest.raises(ValueError, match="benchmark b: every prompt needs its own id, 'p1' is repeated"):
        benchmark([*rows(3), rows(2)[1]])
