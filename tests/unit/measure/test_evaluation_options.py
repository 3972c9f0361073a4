"""The settings that options stand for, and the order in which benchmarks are measured."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from lkspec.measure import evaluation
from lkspec.measure.evaluation import EvaluationOptions, evaluate


class Draft:
    def check_num_draft_tokens(self, number: int) -> None:
        if number > 5:
            raise ValueError(f"num_draft_tokens={number}: 5 heads")


def test_lists_are_crossed_and_sharpness_changes_nothing_at_zero():
    options = EvaluationOptions(temperatures=(0, 1), num_draft_tokens=[1, 3], sharpness=(1, 2), top_k=7, seed=4)
    found = [(s.temperature, s.num_draft_tokens, s.sharpness) for s in options.settings()]
    assert found == [(0, 1, 1), (0, 3, 1), (1, 1, 1), (1, 1, 2), (1, 3, 1), (1, 3, 2)]
    assert {(s.top_k, s.seed) for s in options.settings()} == {(7, 4)}


def test_a_number_is_a_list_of_one():
    (setting,) = EvaluationOptions(temperatures=0.5, num_draft_tokens=2, sharpness=1.5).settings()
    assert (setting.temperature, setting.num_draft_tokens, setting.sharpness) == (0.5, 2, 1.5)


def test_before_training_the_largest_k_is_enough():
    before = EvaluationOptions(temperatures=(0, 1), num_draft_tokens=(1, 7, 3), sharpness=(1, 2)).before_training()
    assert [(s.temperature, s.num_draft_tokens, s.sharpness) for s in before.settings()] == [(0, 7, 1), (1, 7, 1)]


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"temperatures": (1, -1)}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"sharpness": 0}, "sharpness"),
        ({"num_draft_tokens": [2, 9]}, "num_draft_tokens=9: 5 heads"),
    ],
)
def test_values_out_of_range_are_refused_before_anything_is_decoded(monkeypatch, changed, told):
    monkeypatch.setattr(evaluation, "measure", lambda *_, **__: pytest.fail("something was decoded"))
    with pytest.raises(ValueError, match=told):
        list(evaluate(None, Draft(), [SimpleNamespace(name="b")], EvaluationOptions(**changed), show=None))


def test_every_benchmark_is_measured_at_every_setting_and_yielded_at_once(monkeypatch):
    asked, labels = [], []

    def measure(target, draft, benchmark, setting, **options):
        asked.append((benchmark.name, setting.temperature, setting.sharpness, options["num_prompts"], options["rank"]))
        return asked[-1]

    @contextmanager
    def show(label: str):
        labels.append(label)
        yield lambda done, total: None

    monkeypatch.setattr(evaluation, "measure", measure)
    options = EvaluationOptions(temperatures=(0, 1), num_draft_tokens=2, sharpness=(1, 3))
    benchmarks = [SimpleNamespace(name=name) for name in ("one", "two")]
    found = evaluate(None, Draft(), benchmarks, options, show=show, num_prompts=5)
    assert next(found) == ("one", 0.0, 1.0, 5, 0)
    assert len(asked) == 1, "the next is measured when it is asked for"
    assert list(found) == asked[1:]
    assert [(name, t, s) for name, t, s, *_ in asked] == [
        (name, t, s) for name in ("one", "two") for t, s in ((0, 1), (1, 1), (1, 3))
    ]
    assert labels[:3] == ["one T=0 K=2", "one T=1 K=2", "one T=1 K=2 s=3"]
