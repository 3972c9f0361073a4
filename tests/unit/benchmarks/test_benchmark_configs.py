"""The files of conf/benchmark: each builds, names every argument, and takes what is set for all at once."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig

from lkspec.benchmarks.base import Asking

CONF = Path(__file__).parents[3] / "conf"
NAMES = sorted(path.stem for path in (CONF / "benchmark").glob("*.yaml"))


def composed(choice: str, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(overrides=[f"+benchmark={choice}", *overrides]).benchmark


def entries(config: DictConfig) -> dict[str, DictConfig]:
    return {name: entry for name, entry in config.items() if isinstance(entry, DictConfig)}


@pytest.mark.parametrize("choice", NAMES)
def test_every_argument_is_in_the_file(choice):
    found = entries(composed(choice, *(["benchmark.path=traffic.jsonl"] if choice == "jsonl" else [])))
    assert found
    for entry in found.values():
        arguments = {*inspect.signature(get_class(entry._target_)).parameters, *Asking.__annotations__} - {"asking"}
        assert set(entry) == {"_target_", *arguments}


def test_mini_builds_and_obeys_shared_values():
    config = composed("mini", "benchmark.num_prompts=3", "+benchmark.max_new_tokens=8")
    built = {name: instantiate(entry) for name, entry in entries(config).items()}
    assert list(built) == ["mini_chat", "mini_code", "mini_math"]
    for name, benchmark in built.items():
        assert benchmark.name == name
        assert len(benchmark.prompts()) == 3
        assert benchmark.max_new_tokens == 8


def test_code_and_math_are_asked_like_the_public_benchmarks():
    mini, public = entries(composed("mini")), entries(composed("paper"))
    assert mini["mini_code"].template == public["humaneval"].template
    assert mini["mini_math"].template == public["gsm8k"].template


def test_paper_reads_the_real_files(benchmark_data):
    config = composed("paper", f"benchmark.data_dir={benchmark_data}")
    counts = {name: len(instantiate(entry).prompts()) for name, entry in entries(config).items()}
    assert counts == {"mt_bench": 80, "humaneval": 164, "gsm8k": 1319}


def test_own_traffic(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"prompt": "Hi"}\n')
    config = composed("jsonl", f"benchmark.path={tmp_path}/t.jsonl")
    assert instantiate(config.jsonl).prompts()[0].turns == ("Hi",)


def test_choices_can_be_joined():
    assert list(entries(composed("[mini_math,gsm8k]"))) == ["mini_math", "gsm8k"]
