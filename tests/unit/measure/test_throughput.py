"""Throughput: quantiles, speed-ups, verdicts, what may stand in one table; the csv file."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lkspec.benchmarks.base import Benchmark, BenchmarkPrompt
from lkspec.decoding.chain import Request
from lkspec.engines.base import Speed
from lkspec.measure.throughput import ThroughputOptions, measure_throughput
from lkspec.reporting.measured import advice, comparable, print_throughput, speedups
from lkspec.runs.facts import RunFacts
from lkspec.runs.folder import RunFolder
from lkspec.runs.rows import ThroughputRow
from lkspec.runs.tables import read_rows, write_rows

OPTIONS = {
    "concurrency": [1, 4], "num_draft_tokens": [0, 2], "num_requests": 5, "max_new_tokens": 16, "temperature": 0.0
}  # fmt: skip


def row(depths: int, concurrency: int, tokens_per_second: float, **changes) -> ThroughputRow:
    made = ThroughputRow(
        run="r",
        draft="eagle3",
        loss="kl",
        target="tiny",
        steps=10,
        engine="vllm",
        hardware="H100",
        temperature=0.0,
        num_draft_tokens=depths,
        concurrency=concurrency,
        num_requests=64,
        num_tokens=1000,
        tokens_per_second=tokens_per_second,
        median_ms_per_token=10.5,
        p95_ms_per_token=1 / 3,
        protocol='{"max_new_tokens": 16}',
    )
    return replace(made, **changes)


@given(st.lists(st.floats(1e-4, 10), min_size=2), st.sampled_from([5, 50, 95]))
def test_quantiles_are_numpys(seconds, percent):
    expected = np.percentile(np.array(seconds), percent)
    assert Speed(1, 1.0, tuple(seconds)).quantile(percent) == pytest.approx(expected, rel=1e-12)


def test_quantiles_of_one_and_of_none():
    assert Speed(1, 1.0, (0.5,)).quantile(95) == 0.5
    assert np.isnan(Speed(1, 1.0, ()).quantile(50))
    assert Speed(10, 4.0, ()).tokens_per_second == 2.5


def test_advice():
    rows = [
        *(row(0, c, 100.0) for c in (1, 8, 32)),
        row(1, 1, 130.0), row(3, 1, 180.4),
        row(1, 8, 99.0), row(3, 8, 121.0), row(5, 8, 60.0),
        row(1, 32, 87.0), row(3, 32, 70.0),
        row(3, 64, 500.0),
    ]  # fmt: skip
    assert advice(rows) == [
        "best K at concurrency 1: 3 (1.80x)",
        "best K at concurrency 8: 3 (1.21x); drafting loses with K=1 (0.99x), K=5 (0.60x)",
        "drafting loses at concurrency 32: 0.87x with K=1 at best",
        "concurrency 64: nothing to compare with, as nothing was measured without drafting (K=0) yet",
    ]
    assert advice([row(0, 2, 5.0)]) == [
        "concurrency 2: nothing to compare with, as nothing was measured with a draft yet"
    ]
    assert speedups(rows)[8, 3] == pytest.approx(1.21)


def test_one_table_holds_what_differs_in_depths_and_concurrency_only():
    newest = [row(3, 8, 1.0), row(3, 1, 1.0)]
    others = [
        row(0, 8, 1.0, protocol='{"max_new_tokens":16}'),
        row(0, 8, 1.0, protocol='{"max_new_tokens": 32}'),
        row(0, 8, 1.0, hardware="CPU"),
        row(0, 8, 1.0, engine="server"),
        row(0, 8, 1.0, temperature=1.0),
        row(0, 8, 1.0, num_requests=5),
        row(0, 8, 1.0, steps=5),
    ]
    assert comparable([*others, *newest], newest) == [newest[1], others[0], newest[0]]


def test_the_file_reads_back_exactly_and_newer_rows_replace(tmp_path):
    rows = [row(0, 1, 1 / 3), row(3, 1, 2.5, protocol='{"a": "x, \\"y\\""}')]
    write_rows(tmp_path / "t.csv", ThroughputRow, rows)
    assert read_rows(tmp_path / "t.csv", ThroughputRow) == rows
    folder = RunFolder(tmp_path)
    assert folder.read_throughput() == []
    folder.write_throughput(rows)
    folder.write_throughput([replace(rows[0], tokens_per_second=9.0), row(5, 1, 1.0)])
    assert [(r.num_draft_tokens, r.tokens_per_second) for r in folder.read_throughput()] == [
        (0, 9.0),
        (3, 2.5),
        (5, 1.0),
    ]


def test_a_file_of_another_version_is_refused(tmp_path):
    write_rows(tmp_path / "t.csv", ThroughputRow, [row(0, 1, 1.0)])
    text = (tmp_path / "t.csv").read_text().replace("concurrency", "clients")
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ValueError, match=r"missing \['concurrency'\], unknown \['clients'\]"):
        read_rows(tmp_path / "t.csv", ThroughputRow)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"concurrency": []}, "concurrency: expected a list of numbers from 1 on, got []"),
        ({"concurrency": [0, 1]}, "concurrency: expected a list of numbers from 1 on"),
        ({"num_draft_tokens": [-1]}, "num_draft_tokens: expected a list of numbers from 0 on"),
        ({"num_requests": 3}, "num_requests: expected at least the largest concurrency, 4, got 3"),
        ({"max_new_tokens": 1}, "max_new_tokens: expected at least 2, got 1"),
        ({"temperature": -1.0}, "temperature: expected >= 0"),
    ],
)
def test_settings_that_are_refused(changes, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - compared below
        ThroughputOptions(**{**OPTIONS, **changes})
    assert str(caught.value).startswith(message)


def test_a_number_is_a_list_of_one():
    options = ThroughputOptions(**{**OPTIONS, "concurrency": 4, "num_draft_tokens": 3})
    assert (options.concurrencies, options.depths) == ([4], [3])


class RecordingEngine:
    """Says how it was asked; a request takes as long as the concurrency, divided by 1 + K."""

    name = "recorded"
    hardware = "CPU"

    def __init__(self) -> None:
        self.asked: list[tuple[int, int, list[Request]]] = []
        self.protocol = {"engine_version": "1"}

    def throughput_depths(self, wanted):
        return [*wanted, 3]

    def speed(self, requests, sampling, *, num_draft_tokens, concurrency, seed):
        self.asked.append((num_draft_tokens, concurrency, list(requests)))
        seconds = len(requests) * concurrency / (1 + num_draft_tokens)
        return Speed(10 * len(requests), seconds, (0.001, 0.003))


@pytest.fixture
def measured(tiny_target, tmp_path):
    def benchmark(name: str, size: int) -> Benchmark:
        prompts = [BenchmarkPrompt(f"{name}{i}", (f"{name} {i}?", "and?"), None, name) for i in range(size)]
        return Benchmark(
            prompts, name=name, num_prompts=None, template="{prompt}", system_prompt=None, max_new_tokens=999
        )

    facts = RunFacts(
        folder=RunFolder(tmp_path), draft="d", loss="l", loss_arguments={}, target="t", target_settings={},
        data_fingerprint="", seed=0, eta=None, eta_source=None
    )  # fmt: skip
    engine = RecordingEngine()
    benchmarks = [benchmark("a", 3), benchmark("b", 1)]
    rows = measure_throughput(
        engine, tiny_target, benchmarks, ThroughputOptions(**OPTIONS), facts, step=4, show=nullcontext
    )
    return engine, rows


def test_first_turns_of_the_benchmarks_in_turn_and_again(measured, tiny_target):
    engine, _ = measured
    requests = engine.asked[1][2]
    assert [request.prompt_id for request in requests] == ["a/a0#0", "b/b0#1", "a/a1#2", "a/a2#3", "a/a0#4"]
    assert {request.max_new_tokens for request in requests} == {16}
    assert "b 0?" in tiny_target.tokenizer.decode(requests[1].tokens)
    assert "and?" not in tiny_target.tokenizer.decode(requests[1].tokens)


def test_every_setting_is_warmed_up_and_measured(measured):
    engine, rows = measured
    assert [(depths, number) for depths, number, _ in engine.asked[1::2]] == [
        (depths, number) for depths in (0, 2, 3) for number in (1, 4)
    ]
    for (depths, number, warm_up), (_, _, requests) in zip(engine.asked[::2], engine.asked[1::2], strict=True):
        assert [request.tokens for request in warm_up] == [request.tokens for request in requests[:number]]
        assert {request.max_new_tokens for request in warm_up} == {8}, depths
    assert [r.tokens_per_second for r in rows] == [10, 2.5, 30, 7.5, 40, 10]
    assert (rows[0].median_ms_per_token, rows[0].p95_ms_per_token) == pytest.approx((2.0, 2.9))
    assert json.loads(rows[0].protocol)["engine_version"] == "1"
    assert speedups(rows) == pytest.approx({(1, 2): 3, (1, 3): 4, (4, 2): 3, (4, 3): 4})


def test_a_measurement_on_a_cpu_is_labelled(measured, capsys):
    _, rows = measured
    print_throughput(rows)
    printed = capsys.readouterr().out
    assert "throughput of recorded on CPU" in printed
    assert "best K at concurrency 4: 3 (4.00x)" in printed
    assert "measured on a CPU" in printed
    print_throughput([replace(r, hardware="H100") for r in rows])
    assert "measured on a CPU" not in capsys.readouterr().out
