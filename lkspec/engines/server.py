"""An OpenAI-compatible server that is running already (vLLM, SGLang, ...): which model it serves, answers to chats."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from typing import Any

from lkspec.engines.connection import Connection

#: What a server would otherwise take from the model's own ``generation_config.json``, without a word.
PLAIN_SAMPLING: dict[str, Any] = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}


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


class Server:
    """A server by its address.

    Args:
        base_url: with or without ``/v1``.
        model: its name there; null takes the one it serves, if that is the target's.
        concurrency: chats under way at once.
        timeout: seconds that one request may take.
        api_key_variable: environment variable that holds a key, where the server asks for one.
        plain_sampling: also says that no filter or penalty applies, in words that vLLM and SGLang know; other servers
            may refuse them.
        hardware: what it runs on, for tables; null is told apart only as far as this machine's own GPU goes.

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
        plain_sampling: bool = True,
        hardware: str | None = None,
    ) -> None:
        if concurrency < 1:
            raise ValueError(f"engine.concurrency: expected at least 1, got {concurrency}")
        self.connection = Connection(base_url, timeout=timeout, api_key_variable=api_key_variable)
        self.model = model
        self.hardware = hardware
        self._concurrency = concurrency
        self._plain = PLAIN_SAMPLING if plain_sampling else {}
        self.software = ""

    def choose_model(self, target_names: Sequence[str]) -> str:
        """The served model that is the target by one of its names; a model named by the user is taken as it is.

        Raises:
            ValueError: the server serves something else.
        """
        root = self.connection.root
        try:
            served = list(json.loads(self.connection.get("/v1/models"))["data"])
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"engine.base_url: {root}/v1/models is not what an OpenAI-compatible server answers"
            ) from error
        ids = [entry["id"] for entry in served]
        wanted = {_last_part(name) for name in target_names}
        for entry in served:
            names = {_last_part(entry["id"]), _last_part(entry.get("root") or entry["id"])}
            if entry["id"] == self.model or (self.model is None and names & wanted):
                self.model = entry["id"]
                self.software = entry.get("owned_by") or ""
                return entry["id"]
        if self.model is not None:
            raise ValueError(f"engine.model: {root} serves {', '.join(ids)}, not {self.model}")
        raise ValueError(
            f"{root} serves {', '.join(ids)}, but the target is {' or '.join(target_names)}: answers of another model "
            f"are of no use. If it is the same model under another name, say engine.model={ids[0]}"
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
                        running.add(pool.submit(self._answer, request, {**self._plain, **options}))
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
        reply = self.connection.post("/v1/chat/completions", body, request.id)
        choice = reply["choices"][0]
        return ChatAnswer(
            request,
            text=choice["message"]["content"] or "",
            finish_reason=choice["finish_reason"],
            num_tokens=reply["usage"]["completion_tokens"],
        )


def _last_part(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].lower()
