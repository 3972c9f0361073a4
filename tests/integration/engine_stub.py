"""A vLLM or SGLang server of this process, as far as measurements talk to it; a model of the test's own answers."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Model = Callable[[Sequence[int], int], list[int]]  # (prompt, max_tokens) -> token ids


@dataclass
class EngineStub:
    """Drafts K tokens a round, of which it accepts 0, 1, .. K, 0, .. in turn; counts as the real server does.

    Attributes:
        num_draft_tokens: 0 does not draft.
        model: writes the answers.
        foreign_tokens: generated for others during every request.
        lag: looks at the metrics page that still show the state before the last answer.
        served: the model's name.
        changes: to the answer, before it is sent.
    """

    software: str = "vllm"
    num_draft_tokens: int = 2
    model: Model = lambda prompt, max_tokens: [7] * max_tokens
    foreign_tokens: int = 0
    lag: int = 0
    served: str = "tiny"
    changes: dict = field(default_factory=dict)
    server_info: dict = field(default_factory=dict)
    requests: list[dict] = field(default_factory=list)
    generated: int = 0
    drafted_extra: int = 0
    histogram: list[int] = field(default_factory=list)
    running: int = 0
    most_running: int = 0
    url: str = ""

    def __post_init__(self) -> None:
        self.histogram = [0] * (self.num_draft_tokens + 1)
        self._stale = self.page()
        self._lag = 0

    def answer(self, prompt: Sequence[int], max_tokens: int) -> tuple[list[int], list[int]]:
        """Token ids, and this answer's own histogram of accepted tokens."""
        tokens, own = self.model(prompt, max_tokens), [0] * (self.num_draft_tokens + 1)
        position, number = 1, 0  # the first token is the prefill's
        while position < len(tokens) and self.num_draft_tokens:
            accepted = number % (self.num_draft_tokens + 1)
            own[accepted] += 1
            position, number = position + accepted + 1, number + 1
        self._stale, self._lag = self.page(), self.lag
        self.generated += len(tokens) + self.foreign_tokens
        self.histogram = [a + b for a, b in zip(self.histogram, own, strict=True)]
        return tokens, own

    def metrics(self) -> str:
        """The metrics page as it is shown."""
        if self._lag:
            self._lag -= 1
            return self._stale
        return self.page()

    def page(self) -> str:
        """The metrics page as it should be: two engines of one server, the second idle but for half of the tokens."""
        rounds, depths = sum(self.histogram), self.num_draft_tokens
        counts = [("vllm:generation_tokens_total", "", self.generated)]
        if depths:
            at_least = [sum(self.histogram[k:]) for k in range(1, depths + 1)]
            name = "vllm:spec_decode_num_accepted_tokens_per_pos"
            counts += [
                ("vllm:spec_decode_num_drafts_total", "", rounds),
                ("vllm:spec_decode_num_draft_tokens_total", "", rounds * depths + self.drafted_extra),
                ("vllm:spec_decode_num_accepted_tokens_total", "", sum(at_least)),
                *((f"{name}_total", f',position="{k}"', count) for k, count in enumerate(at_least)),
                *((f"{name}_created", f',position="{k}"', 1.7e9) for k in range(depths)),
            ]
        lines = ["# HELP vllm:generation_tokens_total Number of generation tokens processed."]
        for name, labels, count in counts:
            halves = (count, 0.0) if name.endswith("_created") else (count // 2, count - count // 2)
            for engine, value in enumerate(halves):
                lines.append(f'{name}{{engine="{engine}",model_name="a \\"b\\"{{}}"{labels}}} {float(value)}')
        return "\n".join(lines) + "\n"


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        stub = self.server.stub
        pages = {
            "/v1/models": {"data": [{"id": stub.served, "owned_by": stub.software}]},
            "/version": {"version": "0.99"},
            "/metrics": stub.metrics() if stub.software == "vllm" else None,
            "/server_info": {"version": "0.9", **stub.server_info} if stub.software == "sglang" else None,
        }
        page = pages.get(self.path)
        body = page if isinstance(page, str) else json.dumps(page)
        self._reply(404 if page is None else 200, body.encode())

    def do_POST(self) -> None:
        stub = self.server.stub
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            stub.requests.append(body)
            stub.running += 1
            stub.most_running = max(stub.most_running, stub.running)
            respond = self._generate if self.path == "/generate" else self._complete
            status, reply = respond(stub, body)
        self.server.together.wait(0.05 if body.get("stream") else 0.0)  # for others to come in meanwhile
        with self.server.lock:
            stub.running -= 1
        self._reply(status, reply)

    def _complete(self, stub: EngineStub, body: dict) -> tuple[int, bytes]:
        tokens, _ = stub.answer(body["prompt"], body["max_tokens"])
        reason = "stop" if tokens[-1] in body["stop_token_ids"] else "length"
        usage = {"completion_tokens": len(tokens)}
        if body.get("stream"):
            events = [{"choices": [{"text": "x"}]}, {"choices": [{"text": "y"}]}, {"choices": [], "usage": usage}]
            events[-1] |= stub.changes
            lines = [f"data: {json.dumps(event)}\n\n" for event in events]
            return 200, "".join([*lines, "data: [DONE]\n\n"]).encode()
        choice = {"finish_reason": reason, "token_ids": tokens if body.get("return_token_ids") else None}
        return 200, json.dumps({"choices": [{**choice, **stub.changes}], "usage": usage}).encode()

    def _generate(self, stub: EngineStub, body: dict) -> tuple[int, bytes]:
        options = body["sampling_params"]
        tokens, histogram = stub.answer(body["input_ids"], options["max_new_tokens"])
        info = {"finish_reason": {"type": "length"}, "completion_tokens": len(tokens)}
        if sum(histogram):
            last = max(accepted for accepted, count in enumerate(histogram) if count)
            info |= {"spec_verify_ct": sum(histogram), "spec_accept_histogram": histogram[: last + 1]}
        return 200, json.dumps({"output_ids": tokens, "meta_info": {**info, **stub.changes}}).encode()

    def _reply(self, status: int, data: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


class _Server(ThreadingHTTPServer):
    def __init__(self, stub: EngineStub) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.stub, self.lock, self.together = stub, threading.Lock(), threading.Event()


@contextmanager
def running(stub: EngineStub) -> Iterator[EngineStub]:
    """Puts the stub on the network of this machine, at ``stub.url``."""
    server = _Server(stub)
    stub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
