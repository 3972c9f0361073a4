"""The acceptance of a running vLLM server: each answer's share of the counters on its metrics page."""

from __future__ import annotations

import json
import re
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lkspec.decoding.chain import Completion, Request
from lkspec.engines.base import counted_rounds
from lkspec.engines.connection import Connection

_SPEC = "vllm:spec_decode_num_"
_SAMPLE = re.compile(r"(?P<name>[a-zA-Z_:][\w:]*)(?:\{(?P<labels>.*)\})?\s+(?P<value>\S+)(?:\s+-?\d+)?", re.DOTALL)
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_PATIENCE = 50  # looks at the metrics page, which may lag behind an answer,
_PAUSE = 0.1  # so many seconds apart


@dataclass(frozen=True)
class _Counts:
    """What the whole server has done since it was started."""

    generated: int
    rounds: int
    drafted: int
    accepted_per_position: tuple[int, ...]


class VllmApi:
    """vLLM's words for what a measurement needs."""

    software = "vLLM"

    def __init__(self, connection: Connection, model: str) -> None:
        self._connection, self._model = connection, model
        self.version = str(json.loads(connection.get("/version"))["version"])

    def num_draft_tokens(self) -> int:
        """K of the server; 0 where it does not draft."""
        return len(self._counts().accepted_per_position)

    def answer(self, request: Request, sampling: dict[str, Any], *, eos_ids: Sequence[int], seed: int) -> Completion:
        """Answers one prompt, alone on the server.

        Raises:
            ValueError: the server generated tokens for others meanwhile, or its K changes from round to round.
        """
        before = self._counts()
        body = {
            **sampling,
            "model": self._model,
            "prompt": list(request.tokens),
            "add_special_tokens": False,
            "max_tokens": request.max_new_tokens,
            "stop_token_ids": list(eos_ids),
            "seed": seed,
            "return_token_ids": True,
        }
        choice = self._connection.post("/v1/completions", body, request.prompt_id)["choices"][0]
        if choice.get("token_ids") is None:
            raise ValueError(f"{self._connection.root}: vLLM {self.version} does not return token ids; update it")
        tokens = tuple(choice["token_ids"])
        after = self._counts_behind(before, len(tokens))
        rounds = after.rounds - before.rounds
        num_draft_tokens = len(after.accepted_per_position)
        if after.drafted - before.drafted != rounds * num_draft_tokens:
            raise ValueError(
                f"{self._connection.root}: its rounds draft up to {num_draft_tokens} tokens but not always as many "
                f"({after.drafted - before.drafted} in {rounds} rounds); only a fixed number can be measured"
            )
        accepted = [
            now - then for now, then in zip(after.accepted_per_position, before.accepted_per_position, strict=True)
        ]
        return Completion(
            request=request,
            tokens=tokens,
            writers=(),
            finish_reason=choice["finish_reason"],
            rounds=counted_rounds(rounds, accepted),
        )

    def _counts_behind(self, before: _Counts, num_tokens: int) -> _Counts:
        """The counters once they hold an answer of so many tokens, and nothing else."""
        for _ in range(_PATIENCE):
            counts = self._counts()
            generated = counts.generated - before.generated
            if generated >= num_tokens:
                break
            time.sleep(_PAUSE)
        if generated != num_tokens:
            raise ValueError(
                f"{self._connection.root}: its metrics page counts {generated} generated tokens where the one answer "
                f"asked for has {num_tokens}: the acceptance can be read only while nobody else uses the server (and "
                "of one server, not of several behind one address)"
            )
        return counts

    def _counts(self) -> _Counts:
        page = self._connection.get("/metrics")
        generated, rounds, drafted = (
            counters(page, name) for name in ("vllm:generation_tokens", f"{_SPEC}drafts", f"{_SPEC}draft_tokens")
        )
        if not generated:
            raise ValueError(
                f"{self._connection.root}/metrics has no vllm:generation_tokens_total: expected a vLLM server that "
                "was not started with --disable-log-stats"
            )
        accepted = counters(page, f"{_SPEC}accepted_tokens_per_pos", label="position")
        return _Counts(
            generated=int(sum(generated.values())),
            rounds=int(sum(rounds.values())),
            drafted=int(sum(drafted.values())),
            accepted_per_position=tuple(int(accepted[str(position)]) for position in range(len(accepted))),
        )


def counters(page: str, name: str, *, label: str | None = None) -> Mapping[str, float]:
    """A counter of a page in Prometheus's text format, summed over all labels but one; empty without the counter.

    Clients write the name with ``_total`` behind it or without.
    """
    sums: defaultdict[str, float] = defaultdict(float)
    for line in page.split("\n"):  # not splitlines: labels may hold other line breaks
        match = _SAMPLE.fullmatch(line.strip())
        if match is not None and match["name"] in (name, f"{name}_total"):
            labels = dict(_LABEL.findall(match["labels"] or ""))
            sums[labels[label] if label is not None else ""] += float(match["value"])
    return sums
