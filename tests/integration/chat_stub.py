"""An OpenAI-compatible server of this process: answers with the question's words reversed."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class ChatStub(ThreadingHTTPServer):
    """``failures``: status codes of the next answers; ``requests``: the bodies that came."""

    def __init__(self, models: list[dict[str, str]]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.models = models
        self.failures: list[int] = []
        self.requests: list[dict] = []
        self.running = self.most_running = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: ChatStub

    def do_GET(self) -> None:
        self._reply(200, {"data": self.server.models})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append(body)
            self.server.running += 1
            self.server.most_running = max(self.server.most_running, self.server.running)
            failure = self.server.failures.pop(0) if self.server.failures else None
        try:
            if failure is not None:
                self._reply(failure, {"error": "the stub was told to fail"})
                return
            words = body["messages"][-1]["content"].split()[::-1]
            choice = {"message": {"content": " ".join(words)}, "finish_reason": "stop"}
            self._reply(200, {"choices": [choice], "usage": {"completion_tokens": len(words)}})
        finally:
            with self.server.lock:
                self.server.running -= 1

    def _reply(self, status: int, body: dict) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def chat_stub(*models: str, root: str | None = None) -> Iterator[ChatStub]:
    """A running stub that serves models of these names."""
    server = ChatStub([{"id": name, **({"root": root} if root else {})} for name in models])
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
