"""vLLM as the engine: the protocol with its process, against a stand-in package; counters turned into rounds."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lkspec.decoding.chain import Request
from lkspec.decoding.sampling import Sampling
from lkspec.engines.base import counted_rounds
from lkspec.engines.vllm_engine import VllmEngine
from lkspec.measure.metrics import PromptRounds, acceptance_metrics

FAKE = Path(__file__).parents[2] / "fake_vllm"
REQUESTS = [Request("a", 0, (1, 2, 3), 5), Request("b", 0, (4, 5), 6)]


@pytest.fixture
def engine(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(FAKE))
    made = VllmEngine(python=sys.executable, log=str(tmp_path / "vllm.log"))
    made.serve("target", {"method": "eagle3", "model": "draft"}, [9])
    yield made
    made.close()


@given(st.integers(1, 7), st.data())
def test_rounds_behind_counters(num_draft_tokens, data):
    accepted = data.draw(st.lists(st.integers(0, num_draft_tokens), max_size=30))
    per_position = [sum(a >= k for a in accepted) for k in range(1, num_draft_tokens + 1)]
    rounds = counted_rounds(len(accepted), per_position)
    assert Counter(r.accepted for r in rounds) == Counter(accepted)


def test_metrics_of_counted_rounds_are_the_engines_own():
    """tau = 1 + accepted / drafts, as vLLM's documentation has it."""
    rounds = counted_rounds(10, [6, 3, 1])
    metrics = acceptance_metrics([PromptRounds("a", "a", rounds, 20)], num_draft_tokens=3)
    assert metrics.tau == 1 + (6 + 3 + 1) / 10
    assert metrics.acceptance_per_position == (0.6, 0.3, 0.1)


def test_answers_and_each_prompts_own_counters(engine):
    completions = list(engine.decoder(Sampling(1.0), num_draft_tokens=2, seed=0).run(REQUESTS))
    assert [c.request for c in completions] == REQUESTS
    assert [c.tokens for c in completions] == [(7,) * 5, (7,) * 6]
    assert [[r.accepted for r in c.rounds] for c in completions] == [[1, 1, 1], [1, 1]]
    assert engine.version == "0.0-fake"


@pytest.mark.slow
def test_the_target_alone_runs_beside_the_draft(engine):
    drafting = engine.decoder(Sampling(0.0), num_draft_tokens=2, seed=0)
    alone = engine.decoder(Sampling(0.0), num_draft_tokens=0, seed=0)
    for request in REQUESTS:
        assert [len(c.rounds) for c in alone.run([request])] == [0]
        assert [len(c.rounds) for c in drafting.run([request])] == [len(request.tokens)]


def test_a_lost_temperature_is_noticed(engine, capfd):
    engine.decoder(Sampling(1.0), num_draft_tokens=1, seed=0)
    assert "its verification lost the temperature" in " ".join(capfd.readouterr().err.split())


@pytest.mark.parametrize(("concurrency", "at_once"), [(2, 2), pytest.param(9, 5, marks=pytest.mark.slow)])
def test_speed_with_requests_under_way_together(engine, concurrency, at_once):
    requests = [Request(f"r{i}", 0, (1,), 4) for i in range(4)] + [Request("short", 0, (1,), 1)]
    speed = engine.speed(requests, Sampling(0.0), num_draft_tokens=1, concurrency=concurrency, seed=0)
    assert speed.num_tokens == 4 * 4 + 1
    assert speed.seconds_per_token == (at_once,) * 4  # one token alone has no time between tokens
    assert engine.hardware in ("CPU", torch.cuda.is_available() and torch.cuda.get_device_name(0))


@pytest.mark.slow
def test_speed_is_measured_without_another_process_beside(engine):
    engine.decoder(Sampling(0.0), num_draft_tokens=2, seed=0)
    engine.decoder(Sampling(0.0), num_draft_tokens=0, seed=0)
    assert set(engine._processes) == {0, 2}
    engine.speed(REQUESTS, Sampling(0.0), num_draft_tokens=2, concurrency=1, seed=0)
    assert set(engine._processes) == {2}


def test_an_engine_that_ends_shows_its_log(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(FAKE))
    engine = VllmEngine(python=sys.executable, log=str(tmp_path / "vllm.log"))
    engine.serve("missing", {}, [])
    with pytest.raises(ValueError, match=r"vLLM ended \(exit code 1\)(.|\n)*no such model: missing"):
        engine.decoder(Sampling(0.0), num_draft_tokens=1, seed=0)


def test_refusals(engine):
    with pytest.raises(ValueError, match=r"set draft_filter=none"):
        engine.decoder(Sampling(1.0, draft_filter="same"), num_draft_tokens=1, seed=0)
    with pytest.raises(ValueError, match=r"found nothing at nowhere/python; `make serve-env` makes one"):
        VllmEngine(python="nowhere/python")
