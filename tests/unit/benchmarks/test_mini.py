from __future__ import annotations

import pytest

from lkspec.benchmarks.mini import Mini


@pytest.mark.parametrize(("suite", "num_turns"), [("chat", 2), ("code", 1), ("math", 1)])
def test_suite_has_enough_different_prompts(suite, num_turns):
    benchmark = Mini(suite=suite)
    prompts = benchmark.prompts()
    assert benchmark.name == f"mini_{suite}"
    assert len(prompts) >= 20
    assert {len(prompt.turns) for prompt in prompts} == {num_turns}
    assert len({prompt.turns for prompt in prompts}) == len(prompts)
    assert all(prompt.group == prompt.id for prompt in prompts)


def test_code_prompts_are_python_signatures_with_docstrings():
    for prompt in Mini(suite="code").prompts():
        code = compile(f"{prompt.turns[0]}\n    pass\n", prompt.id, "exec")  # the body is the docstring
        assert '"""' in prompt.turns[0]
        assert code.co_names


def test_chat_has_categories():
    assert len({prompt.category for prompt in Mini(suite="chat").prompts()}) >= 4


def test_no_text_of_the_public_benchmarks(benchmark_data):
    from lkspec.benchmarks.gsm8k import GSM8K
    from lkspec.benchmarks.humaneval import HumanEval
    from lkspec.benchmarks.mt_bench import MTBench

    public = set()
    for make in (MTBench, HumanEval, GSM8K):
        public |= {t.strip() for p in make(data_dir=str(benchmark_data)).prompts() for t in p.turns}
    ours = {t.strip() for suite in ("chat", "code", "math") for p in Mini(suite=suite).prompts() for t in p.turns}
    assert not ours & public


def test_unknown_suite():
    with pytest.raises(ValueError, match="expected a suite of chat, code, math, got 'poems'"):
        Mini(suite="poems")
