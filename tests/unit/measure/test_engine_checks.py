"""Whether an engine's text is the target's: against sums over the whole vocabulary in float64, and against faults."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from lkspec.decoding.chain import ChainDecoder, Request
from lkspec.decoding.sampling import Sampling
from lkspec.measure.engine_checks import TextEvidence, check_text, doubts, text_evidence
from lkspec.targets.tiny import TinyTarget


@pytest.fixture(scope="module")
def target(tiny_target) -> TinyTarget:
    return tiny_target


def texts(target: TinyTarget, **sampling: float) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    requests = [Request(f"p{i}", 0, tuple(range(5, 9 + i)), 64) for i in range(8)]
    decoder = ChainDecoder(target, None, sampling=Sampling(**sampling), num_draft_tokens=0, batch_size=8)
    return [(done.request.tokens, done.tokens) for done in decoder.run(requests)]


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_sums_over_the_vocabulary(target, temperature):
    prompt, answer = (5, 6, 7), (9, 8, 30, 12)
    logits = target.model(torch.tensor([[*prompt, *answer]])).logits[0, 2:-1].double() / temperature
    p = (logits - logits.logsumexp(-1, keepdim=True)).exp()
    surprise = [-math.log(p[i, token]) for i, token in enumerate(answer)]
    entropy = [-sum(v * math.log(v) for v in row.tolist() if v > 0) for row in p]
    second = [sum(v * math.log(v) ** 2 for v in row.tolist() if v > 0) for row in p]
    deviation = math.sqrt(sum(s - h * h for s, h in zip(second, entropy, strict=True)))
    found = text_evidence(target, [(prompt, answer)], temperature=temperature)
    assert found.num_tokens == 4
    assert found.surprise == pytest.approx(sum(surprise) / 4, rel=1e-4)
    assert found.expected == pytest.approx(sum(entropy) / 4, rel=1e-4)
    assert found.sigmas == pytest.approx((sum(surprise) - sum(entropy)) / deviation, rel=1e-3)


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_the_targets_own_text_is_believed(target, temperature):
    written = texts(target, temperature=temperature)
    check_text(target, written, temperature=temperature, engine="e")
    if temperature > 0:
        assert abs(text_evidence(target, written, temperature=temperature).sigmas) < 4
    else:
        assert text_evidence(target, written, temperature=0).surprise == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("written_with", "temperature"),
    [
        ({"temperature": 1.0}, 0.0),
        ({"temperature": 0.0}, 1.0),
        ({"temperature": 1.6}, 1.0),
        ({"temperature": 1.0, "top_k": 5}, 1.0),
    ],
    ids=["sampled for greedy", "greedy for sampled", "another temperature", "a filter"],
)
def test_faults_are_found(target, written_with, temperature):
    with pytest.raises(ValueError, match=rf"tokens written at T={temperature:g} are not the target's own"):
        check_text(target, texts(target, **written_with), temperature=temperature, engine="e")


@pytest.mark.parametrize(
    ("surprise", "sigmas", "believed"), [(1.05, 50.0, True), (1.5, 3.0, True), (1.5, 7.0, False), (0.5, -7.0, False)]
)
def test_precision_and_chance_are_allowed_for(surprise, sigmas, believed):
    assert TextEvidence(100, surprise, 1.0, sigmas).is_of_the_target == believed


def test_doubts_name_what_is_far_from_the_walk():
    def row(low: float, high: float, walk_tau: float | None) -> SimpleNamespace:
        return SimpleNamespace(benchmark="gsm8k", temperature=1.0, tau=2.0, low=low, high=high, walk_tau=walk_tau)

    near, few, far = row(1.99, 2.01, 2.09), row(1.5, 2.5, 2.9), row(1.95, 2.05, 2.2)
    unknown = row(1.95, 2.05, None)
    assert doubts([near, few, unknown]) == []
    [line] = doubts([near, far])
    assert line.startswith("gsm8k T=1: tau 2.000, but this run's draft would have had 2.200")
