"""The acceptance of a running SGLang server: what its own ``/generate`` tells of each answer.

SGLang's metrics page has no counter of drafted or accepted tokens (its acceptance rates there are gauges of the last
interval), but every answer carries a histogram of its own rounds, whoever else uses the server.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from lkspec.decoding.chain import Completion, Request
from lkspec.engines.base import rounds_of_histogram
from lkspec.engines.connection import Connection

# Newest name first.
_HISTOGRAM = ("spec_correct_drafts_histogram", "spec_accept_histogram")


class SglangApi:
    """SGLang's words for what a measurement needs."""

    software = "SGLang"

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._info = self._server_info()
        self.version = str(self._info.get("version", "unknown"))

    def num_draft_tokens(self) -> int:
        """K of the server; 0 where it does not draft.

        Raises:
            ValueError: it drafts trees, or adapts K.
        """
        if not self._info.get("speculative_algorithm"):
            return 0
        if self._info.get("speculative_eagle_topk") not in (None, 1) or self._info.get("speculative_adaptive"):
            raise ValueError(
                f"{self._connection.root} drafts trees or changes K by itself: a fixed number of tokens, one after "
                "another, is measured; start it with --speculative-eagle-topk 1"
            )
        return int(self._info["speculative_num_draft_tokens"]) - 1  # SGLang's number counts the verified one too

    def answer(self, request: Request, sampling: dict[str, Any], *, eos_ids: Sequence[int], seed: int) -> Completion:
        """Answers one prompt; SGLang has no seed of a request, ``seed`` is not used.

        Raises:
            ValueError: an answer without token ids or without its histogram of rounds.
        """
        options = {**sampling, "max_new_tokens": request.max_new_tokens, "stop_token_ids": list(eos_ids)}
        body = {"input_ids": list(request.tokens), "sampling_params": options}
        reply = self._connection.post("/generate", body, request.prompt_id)
        info = reply["meta_info"]
        if "output_ids" not in reply:
            raise ValueError(f"{self._connection.root}: SGLang {self.version} does not return token ids; update it")
        return Completion(
            request=request,
            tokens=tuple(reply["output_ids"]),
            writers=(),
            finish_reason=info["finish_reason"]["type"],
            rounds=rounds_of_histogram(self._histogram(info)),
        )

    def _server_info(self) -> dict[str, Any]:
        try:
            info: dict[str, Any] = json.loads(self._connection.get("/server_info"))
        except ValueError:  # the older name of the same page
            info = json.loads(self._connection.get("/get_server_info"))
        return info

    def _histogram(self, info: dict[str, Any]) -> list[int]:
        histogram: list[int] | None = next((info[name] for name in _HISTOGRAM if info.get(name)), None)
        verified = info.get("spec_verify_ct", 0)
        if histogram is None and verified == 0:  # ended before the first round
            return []
        if histogram is None or sum(histogram) != verified:
            raise ValueError(
                f"{self._connection.root}: SGLang {self.version} counts {verified} rounds of an answer but its "
                f"histogram of accepted tokens is {histogram}: acceptance per position cannot be read; update it"
            )
        return histogram
