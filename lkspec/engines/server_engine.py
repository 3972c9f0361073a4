"""A running vLLM or SGLang server as the engine: it answers benchmark prompts, and tells what it accepted."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Protocol
from urllib.parse import urlsplit

import torch

from lkspec.decoding.chain import Completion, Request
from lkspec.decoding.sampling import Sampling
from lkspec.engines.base import OneByOne, Speed, request_seed
from lkspec.engines.server import PLAIN_SAMPLING, Server
from lkspec.engines.sglang_api import SglangApi
from lkspec.engines.vllm_api import VllmApi

_THIS_MACHINE = {"localhost", "127.0.0.1", "::1"}


class Api(Protocol):
    """What servers say each in words of their own."""

    software: str
    version: str

    def num_draft_tokens(self) -> int:
        """K of the server; 0 where it does not draft."""
        ...

    def answer(self, request: Request, sampling: dict[str, Any], *, eos_ids: Sequence[int], seed: int) -> Completion:
        """Answers one prompt and counts its rounds."""
        ...


class ServerEngine:
    """A server that runs one K of its own, with a draft of its own.

    Args:
        server: where it is.
        target_names: folder, hub id or name of the target that it must serve.
        eos_ids: tokens that end an answer.

    Raises:
        ValueError: it serves another model, or is neither vLLM nor SGLang.
    """

    name = "server"
    serves_alone = False  # beside the draft: a server runs with it or without

    def __init__(self, server: Server, *, target_names: Sequence[str], eos_ids: Sequence[int]) -> None:
        self._connection = server.connection
        self._model = server.choose_model(target_names)
        self._eos_ids = eos_ids
        self._api = _api(server, self._model)
        self.hardware = server.hardware or _hardware(self._connection.root)
        self.protocol = {"engine_version": f"{self._api.software} {self._api.version}"}

    def decoder(self, sampling: Sampling, *, num_draft_tokens: int, seed: int) -> OneByOne:
        """What answers requests at one setting.

        Raises:
            ValueError: a K that is not the server's, or filters that also apply to q, which no server does.
        """
        own = self._api.num_draft_tokens()
        where = f"{self._connection.root} ({self._api.software} {self._api.version})"
        if own == 0:
            raise ValueError(
                f"{where} does not draft: there is no acceptance to measure; start it with the exported draft (lkspec "
                "export prints how), or measure its speed by `lkspec throughput`"
            )
        if own != num_draft_tokens:
            raise ValueError(
                f"{where} drafts {own} tokens a round, but num_draft_tokens asks for {num_draft_tokens}: say "
                f"num_draft_tokens=[{own}], or start the server with {num_draft_tokens}"
            )
        if sampling.draft_filter == "same":
            raise ValueError("engine=server: servers filter the target's distribution only: set draft_filter=none")
        words, eos_ids = _words(sampling), self._eos_ids
        return OneByOne(
            lambda request: self._api.answer(request, words, eos_ids=eos_ids, seed=request_seed(seed, request))
        )

    def throughput_depths(self, wanted: Sequence[int]) -> list[int]:
        """The one K that the server runs (0: it does not draft), whatever is wanted."""
        return [self._api.num_draft_tokens()]

    def speed(
        self, requests: Sequence[Request], sampling: Sampling, *, num_draft_tokens: int, concurrency: int, seed: int
    ) -> Speed:
        """Answers requests, so many at a time; every token's time is that of its arrival here.

        Raises:
            ValueError: a request that the server refuses.
        """
        timed = partial(self._timed, body=_words(sampling), seed=seed)
        with ThreadPoolExecutor(concurrency) as pool:
            start = time.perf_counter()
            answers = list(pool.map(timed, requests))
            seconds = time.perf_counter() - start
        per_token = [spent / (tokens - 1) for tokens, spent in answers if tokens > 1]
        return Speed(sum(tokens for tokens, _ in answers), seconds, tuple(per_token))

    def _timed(self, request: Request, *, body: dict[str, Any], seed: int) -> tuple[int, float]:
        """The number of tokens of an answer, and the seconds from its first to its last."""
        body = {
            **body,
            "model": self._model,
            "prompt": list(request.tokens),
            "max_tokens": request.max_new_tokens,
            "stop_token_ids": list(self._eos_ids),
            "seed": request_seed(seed, request),
            "stream": True,
            "stream_options": {"include_usage": True},
            "cache_salt": uuid.uuid4().hex,  # repeated prompts are not to be answered from vLLM's prefix cache
        }
        arrivals: list[float] = []
        num_tokens = 0
        for event in self._connection.stream("/v1/completions", body, request.prompt_id):
            if event.get("choices"):
                arrivals.append(time.perf_counter())
            if event.get("usage"):
                num_tokens = event["usage"]["completion_tokens"]
        if not arrivals or not num_tokens:
            raise ValueError(f"{self._connection.root}: the answer to {request.prompt_id} is empty or is not counted")
        return num_tokens, arrivals[-1] - arrivals[0]


def _api(server: Server, model: str) -> Api:
    if server.software == "vllm":
        return VllmApi(server.connection, model)
    if server.software == "sglang":
        return SglangApi(server.connection)
    raise ValueError(
        f"{server.connection.root} calls itself {server.software or 'nothing'}: vLLM and SGLang can be measured, by "
        "what they tell beside their answers; other servers only answer (lkspec generate)"
    )


def _words(sampling: Sampling) -> dict[str, Any]:
    return {
        **PLAIN_SAMPLING,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,
    }


def _hardware(root: str) -> str:
    """CPU where the server runs on this machine, which has no GPU; a server elsewhere does not tell."""
    here = urlsplit(root).hostname in _THIS_MACHINE
    return "CPU" if here and not torch.cuda.is_available() else "unknown hardware"
