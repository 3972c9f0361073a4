"""Acceptance and speed of running servers, against stand-ins of this process that count as vLLM and SGLang do."""

from __future__ import annotations

from collections import Counter

import pytest
from engine_stub import EngineStub, running

from lkspec.decoding.chain import Completion, Request
from lkspec.decoding.sampling import Sampling
from lkspec.engines import connection, vllm_api
from lkspec.engines.server import Server
from lkspec.engines.server_engine import ServerEngine

REQUESTS = [Request("a", 0, (1, 2, 3), 9), Request("b", 1, (4, 5), 5)]
SGLANG = {"speculative_algorithm": "EAGLE3", "speculative_eagle_topk": 1, "speculative_num_draft_tokens": 3}


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(connection, "_PAUSES", ())
    monkeypatch.setattr(vllm_api, "_PAUSE", 0.0)


def engine_of(stub: EngineStub, **options) -> ServerEngine:
    return ServerEngine(Server(base_url=stub.url, **options), target_names=["tiny"], eos_ids=[2])


def answers(stub: EngineStub, sampling: Sampling | None = None, num_draft_tokens: int = 2) -> list[Completion]:
    decoder = engine_of(stub).decoder(sampling or Sampling(0.5, 5, 0.9), num_draft_tokens=num_draft_tokens, seed=0)
    return list(decoder.run(REQUESTS))


# With K = 2 the stand-in accepts 0, 1, 2, 0, .. tokens: 9 tokens are 1 + (1 + 2 + 3 + 1) and one of a round of two.
EXPECTED = [Counter({0: 2, 1: 2, 2: 1}), Counter({0: 1, 1: 1, 2: 1})]


@pytest.mark.parametrize(
    "stub",
    [EngineStub(), EngineStub(lag=3), EngineStub("sglang", server_info=SGLANG)],
    ids=["vllm", "vllm whose metrics lag behind", "sglang"],
)
def test_each_answers_own_rounds(stub):
    with running(stub):
        completions = answers(stub)
    assert [completion.request for completion in completions] == REQUESTS
    assert [completion.tokens for completion in completions] == [(7,) * 9, (7,) * 5]
    assert [completion.finish_reason for completion in completions] == ["length", "length"]
    assert [Counter(r.accepted for r in completion.rounds) for completion in completions] == EXPECTED


def test_what_vllm_is_asked():
    with running(EngineStub()) as stub:
        answers(stub)
        first, second = stub.requests
    expected = {
        "model": "tiny", "prompt": [1, 2, 3], "max_tokens": 9, "temperature": 0.5, "top_k": 5, "top_p": 0.9,
        "min_p": 0.0, "repetition_penalty": 1.0, "stop_token_ids": [2], "return_token_ids": True,
        "add_special_tokens": False,
    }  # fmt: skip
    assert {key: first[key] for key in expected} == expected
    assert first.keys() - expected.keys() == {"seed"}
    assert first["seed"] != second["seed"]


def test_what_sglang_is_asked():
    with running(EngineStub("sglang", server_info=SGLANG)) as stub:
        answers(stub, Sampling(1.0))
    assert stub.requests[0] == {
        "input_ids": [1, 2, 3],
        "sampling_params": {
            "temperature": 1.0, "top_k": -1, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0,
            "max_new_tokens": 9, "stop_token_ids": [2],
        },
    }  # fmt: skip


def test_an_answer_that_ends_at_once_has_no_round():
    for stub in (EngineStub(), EngineStub("sglang", server_info=SGLANG)):
        stub.model = lambda prompt, max_tokens: [2]
        with running(stub):
            assert [completion.rounds for completion in answers(stub)] == [(), ()]


@pytest.mark.parametrize(
    ("stub", "message"),
    [
        (
            EngineStub(foreign_tokens=4),
            r"counts 13 generated tokens where the one answer asked for has 9: .*nobody else",
        ),
        (EngineStub(lag=10**6), r"counts 0 generated tokens where the one answer asked for has 9"),
        (EngineStub(num_draft_tokens=3), r"drafts 3 tokens a round, but num_draft_tokens asks for 2: say .*=\[3\]"),
        (EngineStub(num_draft_tokens=0), r"vLLM 0.99\) does not draft: .*lkspec throughput"),
        (EngineStub(changes={"token_ids": None}), r"vLLM 0.99 does not return token ids"),
        (EngineStub("sglang"), r"SGLang 0.9\) does not draft"),
        (EngineStub("sglang", server_info={**SGLANG, "speculative_eagle_topk": 4}), r"drafts trees"),
        (
            EngineStub("sglang", server_info=SGLANG, changes={"spec_accept_histogram": None}),
            r"counts 5 rounds of an answer but its histogram of accepted tokens is None",
        ),
        (EngineStub("llamacpp"), r"calls itself llamacpp: vLLM and SGLang can be measured"),
    ],
)
def test_what_cannot_be_measured(stub, message):
    with running(stub), pytest.raises(ValueError, match=message):
        answers(stub)


def test_rounds_of_changing_length():
    with running(EngineStub()) as stub:
        counting = stub.model

        def shorter_once(prompt, max_tokens):
            stub.drafted_extra = -1
            return counting(prompt, max_tokens)

        stub.model = shorter_once
        with pytest.raises(ValueError, match=r"draft up to 2 tokens but not always as many \(9 in 5 rounds\)"):
            answers(stub)


def test_filters_of_the_draft():
    with running(EngineStub()) as stub, pytest.raises(ValueError, match="set draft_filter=none"):
        answers(stub, Sampling(1.0, draft_filter="same"))


def test_a_server_without_counters():
    with running(EngineStub()) as stub:
        stub.metrics = lambda: "process_cpu_seconds_total 3.0\n"
        with pytest.raises(ValueError, match=r"has no vllm:generation_tokens_total: .*--disable-log-stats"):
            answers(stub)


@pytest.mark.parametrize(
    "stub", [EngineStub(), EngineStub("sglang", server_info=SGLANG), EngineStub(num_draft_tokens=0)]
)
def test_speed(stub):
    requests = [Request(f"r{i}", 0, (1,), 4) for i in range(6)] + [Request("short", 0, (1,), 1)]
    with running(stub):
        engine = engine_of(stub, hardware="H100")
        assert engine.throughput_depths([1, 7]) == [stub.num_draft_tokens]
        speed = engine.speed(requests, Sampling(0.0), num_draft_tokens=2, concurrency=3, seed=0)
    assert speed.num_tokens == 6 * 4 + 1
    assert len(speed.seconds_per_token) == 6  # one token alone has no time between tokens
    assert all(0 <= seconds < speed.seconds for seconds in speed.seconds_per_token)
    assert 1 < stub.most_running <= 3
    assert len({body["cache_salt"] for body in stub.requests}) == 7
    assert engine.hardware == "H100"


def test_a_stream_that_breaks_off():
    stub = EngineStub(changes={"error": {"message": "out of memory"}})
    with running(stub), pytest.raises(ValueError, match=r"r broke off: .*out of memory"):
        engine_of(stub).speed([Request("r", 0, (1,), 4)], Sampling(0.0), num_draft_tokens=2, concurrency=1, seed=0)


def test_an_answer_without_a_token_count():
    stub = EngineStub(changes={"usage": None})
    with running(stub), pytest.raises(ValueError, match=r"the answer to r is empty or is not counted"):
        engine_of(stub).speed([Request("r", 0, (1,), 4)], Sampling(0.0), num_draft_tokens=2, concurrency=1, seed=0)


@pytest.mark.parametrize(("host", "known"), [("127.0.0.1", True), ("example.org", False)])
def test_hardware_of_a_server_elsewhere_is_unknown(host, known, monkeypatch):
    from lkspec.engines import server_engine

    monkeypatch.setattr(server_engine.torch.cuda, "is_available", lambda: False)
    assert server_engine._hardware(f"http://{host}:8000") == ("CPU" if known else "unknown hardware")
    monkeypatch.setattr(server_engine.torch.cuda, "is_available", lambda: True)
    assert server_engine._hardware(f"http://{host}:8000") == "unknown hardware"
