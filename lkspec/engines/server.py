"""A client of any OpenAI-compatible server (vLLM, SGLang, ...): answers chats, many at a time."""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from typing import Any

_RETRIED = {429, 500, 502, 503, 504}
_PAUSES = (1.0, 4.0, 16.0)  # seconds before another try


@dataclass(frozen=True)
class ChatRequest:
    """One chat to answer; the seed fixes the server's random numbers where it honours them."""

    id: str
    messages: tuple[dict[str, str], ...]
    seed: int


@dataclass(frozen=True)
class ChatAnswer:
    """The server's answer.

    Attributes:
        finish_reason: ``stop`` or ``length``.
        num_tokens: generated, by the server's own count.
    """

    request: ChatRequest
    text: str
    finish_reason: str
    num_tokens: int


class ChatServer:
    """A server by its address.

    Args:
        base_url: with or without ``/v1``.
        model: its name there; null takes the one it serves, if that is the target's.
        concurrency: requests under way at once.
        timeout: seconds that one request may take.
        api_key_variable: environment variable that holds a key, where the server asks for one.

    Raises:
        ValueError: an address that is none, concurrency < 1.
    """

    def __init__(
        self,
        *,
        base_url: str | None,
        model: str | None = None,
        concurrency: int = 64,
        timeout: float = 600.0,
        api_key_variable: str = "OPENAI_API_KEY",
    ) -> None:
        if base_url is None or not base_url.startswith(("http://", "https://")):
            raise ValueError(
                f"base_url: expected the server's address, such as http://localhost:8000, got {base_url!r}"
            )
        if concurrency < 1:
            raise ValueError(f"concurrency: expected at least 1, got {concurrency}")
        self._root = base_url.rstrip("/").removesuffix("/v1")
        self.model = model
        self._concurrency, self._timeout = concurrency, timeout
        self._key = os.environ.get(api_key_variable)

    def choose_model(self, target_names: Sequence[str]) -> str:
        """The served model that is the target by one of its names; a model named by the user is taken as it is.

        Raises:
            ValueError: the server serves something else.
        """
        served = list(self._get("/v1/models")["data"])
        ids = [entry["id"] for entry in served]
        if self.model is not None:
            if self.model not in ids:
                raise ValueError(f"engine.model: {self._root} serves {', '.join(ids)}, not {self.model}")
            return self.model
        wanted = {_last_part(name) for name in target_names}
        for entry in served:
            if {_last_part(entry["id"]), _last_part(entry.get("root") or entry["id"])} & wanted:
                self.model = entry["id"]
                return entry["id"]
        raise ValueError(
            f"{self._root} serves {', '.join(ids)}, but the target is {' or '.join(target_names)}: answers of another "
            f"model would train the wrong draft. If it is the same model under another name, say engine.model={ids[0]}"
        )

    def answers(
        self, requests: Iterable[ChatRequest], *, temperature: float, top_p: float, max_tokens: int
    ) -> Iterator[ChatAnswer]:
        """Answers as they come, ``concurrency`` requests under way at once.

        Raises:
            ValueError: a request that the server refuses, or that fails again and again.
        """
        options = {"model": self.model, "temperature": temperature, "top_p": top_p, "max_tokens": max_tokens}
        waiting = iter(requests)
        with ThreadPoolExecutor(self._concurrency) as pool:
            running: set[Future[ChatAnswer]] = set()
            try:
                while True:
                    for request in islice(waiting, self._concurrency - len(running)):
                        running.add(pool.submit(self._answer, request, options))
                    if not running:
                        return
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    for future in done:
                        yield future.result()
            finally:
                for future in running:
                    future.cancel()

    def _answer(self, request: ChatRequest, options: dict[str, Any]) -> ChatAnswer:
        body = {**options, "messages": list(request.messages), "seed": request.seed}
        reply = self._post("/v1/chat/completions", body, request.id)
        choice = reply["choices"][0]
        return ChatAnswer(
            request,
            text=choice["message"]["content"] or "",
            finish_reason=choice["finish_reason"],
            num_tokens=reply["usage"]["completion_tokens"],
        )

    def _post(self, path: str, body: dict[str, Any], what: str) -> Any:
        data = json.dumps(body).encode()
        for pause in (*_PAUSES, None):
            try:
                return self._send(urllib.request.Request(self._root + path, data=data, headers=self._headers()))
            except urllib.error.HTTPError as error:
                detail = error.read().decode(errors="replace")[:500]
                if error.code not in _RETRIED or pause is None:
                    raise ValueError(f"{self._root}: {what} was refused with {error.code}: {detail}") from error
            except OSError as error:  # no connection, or none any more
                if pause is None:
                    raise ValueError(f"{self._root}: {what} got no answer ({error}); is the server up?") from error
            time.sleep(pause)
        raise AssertionError("the last try returns or raises")

    def _get(self, path: str) -> Any:
        try:
            return self._send(urllib.request.Request(self._root + path, headers=self._headers()))
        except OSError as error:
            raise ValueError(f"base_url: no OpenAI-compatible server at {self._root} ({error})") from error

    def _send(self, request: urllib.request.Request) -> Any:
        with urllib.request.urlopen(request, timeout=self._timeout) as reply:
            return json.loads(reply.read())

    def _headers(self) -> dict[str, str]:
        key = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        return {"Content-Type": "application/json", **key}


def _last_part(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].lower()
