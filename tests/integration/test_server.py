"""The client of OpenAI-compatible servers, and ``lkspec generate`` by one, against a server in this process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from chat_stub import chat_stub

from lkspec.engines import connection
from lkspec.engines.server import ChatRequest, Server

REQUESTS = [ChatRequest(f"p{i}", ({"role": "user", "content": f"why {i}"},), seed=5) for i in range(20)]
SAMPLING = {"temperature": 0.5, "top_p": 0.9, "max_tokens": 7}


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(connection, "_PAUSES", (0.0, 0.0))


def test_answers_belong_to_their_requests():
    with chat_stub("org/model") as stub:
        server = Server(base_url=stub.url, model="org/model", concurrency=4)
        answers = {answer.request.id: answer for answer in server.answers(REQUESTS, **SAMPLING)}
        assert {name: answer.text for name, answer in answers.items()} == {f"p{i}": f"{i} why" for i in range(20)}
        assert {(a.finish_reason, a.num_tokens) for a in answers.values()} == {("stop", 2)}
        assert 1 < stub.most_running <= 4
        sent = {key: stub.requests[0][key] for key in ("model", "seed", *SAMPLING)}
        assert sent == {"model": "org/model", "seed": 5, **SAMPLING}


@pytest.mark.parametrize("plain", [True, False])
def test_filters_and_penalties_of_the_models_own_configuration_are_turned_off(plain):
    words = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
    with chat_stub("m") as stub:
        list(Server(base_url=stub.url, model="m", plain_sampling=plain).answers(REQUESTS[:1], **SAMPLING))
        assert {key: stub.requests[0].get(key) for key in words} == (words if plain else dict.fromkeys(words))


def test_something_else_that_answers():
    with chat_stub("m") as stub:
        stub.models = None
        with pytest.raises(ValueError, match=r"/v1/models is not what an OpenAI-compatible server answers"):
            Server(base_url=stub.url).choose_model(["m"])


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_addresses(suffix):
    with chat_stub("m") as stub:
        assert Server(base_url=stub.url + suffix).choose_model(["m"]) == "m"


@pytest.mark.parametrize(
    ("served", "root", "names"),
    [
        ("Qwen/Qwen3-8B", None, ["/models/qwen3-8b"]),
        ("Qwen3-8B", None, ["Qwen/Qwen3-8B", "mine"]),
        ("chat", "/models/Qwen3-8B/", ["Qwen/Qwen3-8B"]),
    ],
)
def test_the_target_under_its_names(served, root, names):
    with chat_stub("other", served, root=root) as stub:
        found = Server(base_url=stub.url).choose_model(names)
        assert found == served or root is not None


def test_another_model_is_refused_unless_named():
    with chat_stub("other/model") as stub:
        with pytest.raises(
            ValueError, match=r"serves other/model, but the target is mine(.|\n)*engine.model=other/model"
        ):
            Server(base_url=stub.url).choose_model(["mine"])
        assert Server(base_url=stub.url, model="other/model").choose_model(["mine"]) == "other/model"
        with pytest.raises(ValueError, match=r"serves other/model, not absent"):
            Server(base_url=stub.url, model="absent").choose_model(["mine"])


def test_a_busy_server_is_asked_again():
    with chat_stub("m") as stub:
        stub.failures = [503, 429]
        [answer] = Server(base_url=stub.url, model="m", concurrency=1).answers(REQUESTS[:1], **SAMPLING)
        assert answer.text == "0 why"
        assert len(stub.requests) == 3


@pytest.mark.parametrize(("failures", "tries"), [([400], 1), ([503, 503, 503], 3)])
def test_refusals_end_it(failures, tries):
    with chat_stub("m") as stub:
        stub.failures = failures
        with pytest.raises(ValueError, match=rf"p0 was refused with {failures[0]}: .*told to fail"):
            list(Server(base_url=stub.url, model="m", concurrency=1).answers(REQUESTS[:1], **SAMPLING))
        assert len(stub.requests) == tries


def test_no_server():
    with chat_stub("m") as stub:
        url = stub.url
    with pytest.raises(ValueError, match=f"{url}/v1/models cannot be read"):
        Server(base_url=url).choose_model(["m"])
    with pytest.raises(ValueError, match=f"{url}: p0 got no answer"):
        list(Server(base_url=url, model="m").answers(REQUESTS[:1], **SAMPLING))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_url": None}, "engine.base_url: expected the server's address, such as http://localhost:8000, got None"),
        ({"base_url": "localhost:8000"}, "engine.base_url: expected the server's address"),
        ({"base_url": "http://localhost", "concurrency": 0}, "engine.concurrency: expected at least 1, got 0"),
    ],
)
def test_settings_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Server(**options)


def test_a_key_is_sent(monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    server = Server(base_url="http://localhost", api_key_variable="MY_KEY")
    assert server.connection._request("/").get_header("Authorization") == "Bearer secret"


class TestGenerate:
    COMMAND = ("generate", "target=tiny", "engine=server", "prompts=prompts.jsonl", "out=answers.jsonl")

    @pytest.fixture(autouse=True)
    def prompts(self, tmp_path):
        rows = [{"id": f"p{i}", "prompt": f"tell me {i}"} for i in range(6)]
        (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def test_writes_what_training_reads(self, lkspec_cli):
        with chat_stub("tiny") as stub:
            outcome = lkspec_cli(
                *self.COMMAND, f"engine.base_url={stub.url}", "engine.concurrency=3", "temperature=0.5"
            )
        assert outcome.code == 0, outcome.err
        rows = [json.loads(line) for line in Path("answers.jsonl").read_text().splitlines()]
        assert [row["messages"][1]["content"] for row in rows] == [f"{i} me tell" for i in range(6)]
        assert stub.requests[0]["temperature"] == 0.5
        assert "answered by tiny" in outcome.out

    def test_resumes(self, lkspec_cli):
        with chat_stub("tiny") as stub:
            stub.failures = [400]
            command = (*self.COMMAND, f"engine.base_url={stub.url}", "engine.concurrency=1")
            assert lkspec_cli(*command).code == 2
            stub.failures = []
            whole = lkspec_cli(*command)
            assert whole.code == 0, whole.err
            assert len(Path("answers.jsonl").read_text().splitlines()) == 6

    def test_another_model_is_refused(self, lkspec_cli):
        with chat_stub("gpt-5") as stub:
            outcome = lkspec_cli(*self.COMMAND, f"engine.base_url={stub.url}")
        assert outcome.code == 2
        assert "serves gpt-5, but the target is tiny" in outcome.err
        assert not Path("answers.jsonl.partial").exists()
