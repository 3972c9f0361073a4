"""Throughput of a serving engine: tokens per second by concurrency and K."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Protocol

from lkspec.benchmarks.base import Benchmark
from lkspec.decoding.chain import Request
from lkspec.decoding.sampling import Sampling
from lkspec.drafts.base import Draft
from lkspec.engines.base import Speed
from lkspec.measure.evaluation import listed
from lkspec.runs.facts import RunFacts
from lkspec.runs.rows import ThroughputRow
from lkspec.targets.base import Target

_WARM_UP_TOKENS = 8  # of each request that is not timed


class TimedEngine(Protocol):
    """A serving engine whose speed can be measured.

    Attributes:
        hardware: what it runs on; known once it has answered.
        protocol: what measurements depend on beside the sampling; known once it has answered.
    """

    name: str
    hardware: str

    @property
    def protocol(self) -> dict[str, Any]: ...

    def throughput_depths(self, wanted: Sequence[int]) -> list[int]:
        """Those K that it can be measured at; 0 is without drafting."""
        ...

    def speed(
        self, requests: Sequence[Request], sampling: Sampling, *, num_draft_tokens: int, concurrency: int, seed: int
    ) -> Speed:
        """Answers requests, so many at a time."""
        ...


@dataclass(frozen=True)
class ThroughputOptions:
    """What is measured; every concurrency is crossed with every K, a number stands for a list of one.

    Raises:
        ValueError: values out of range.
    """

    concurrency: Sequence[int] | int
    num_draft_tokens: Sequence[int] | int
    num_requests: int
    max_new_tokens: int
    temperature: float
    seed: int = 0

    def __post_init__(self) -> None:
        for name, values, least in (("concurrency", self.concurrencies, 1), ("num_draft_tokens", self.depths, 0)):
            if not values or min(values) < least:
                raise ValueError(f"{name}: expected a list of numbers from {least} on, got {values}")
        if self.num_requests < max(self.concurrencies):
            raise ValueError(
                f"num_requests: expected at least the largest concurrency, {max(self.concurrencies)}, got "
                f"{self.num_requests}"
            )
        if self.max_new_tokens < 2:
            raise ValueError(f"max_new_tokens: expected at least 2, got {self.max_new_tokens}")
        assert self.sampling is not None  # refuses a temperature out of range

    @property
    def concurrencies(self) -> list[int]:
        return listed(self.concurrency)

    @property
    def depths(self) -> list[int]:
        return listed(self.num_draft_tokens)

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature)

    def check(self, draft: Draft) -> None:
        """Refuses K that the draft cannot draft.

        Raises:
            ValueError: a K out of range.
        """
        for depths in self.depths:
            if depths > 0:
                draft.check_num_draft_tokens(depths)


def measure_throughput(
    engine: TimedEngine,
    target: Target,
    benchmarks: Sequence[Benchmark],
    options: ThroughputOptions,
    facts: RunFacts,
    *,
    step: int,
    show: Callable[[str], AbstractContextManager[Any]],
) -> list[ThroughputRow]:
    """Measures every concurrency at every K of the engine; a few tokens of every request come before, untimed.

    ``show`` tells a user, while it lasts, what is measured.
    """
    requests = _requests(target, benchmarks, options)
    warm_up = [replace(request, max_new_tokens=min(_WARM_UP_TOKENS, options.max_new_tokens)) for request in requests]
    rows = []
    for depths, concurrency in itertools.product(engine.throughput_depths(options.depths), options.concurrencies):
        with show(f"K={depths}, {concurrency} requests at a time"):
            how: dict[str, Any] = {"num_draft_tokens": depths, "concurrency": concurrency, "seed": options.seed}
            engine.speed(warm_up[:concurrency], options.sampling, **how)
            speed = engine.speed(requests, options.sampling, **how)
        protocol = {
            **engine.protocol,
            "benchmarks": [benchmark.protocol(None) for benchmark in benchmarks],
            "max_new_tokens": options.max_new_tokens,
            "seed": options.seed,
        }
        rows.append(
            ThroughputRow(
                run=facts.folder.name,
                draft=facts.draft,
                loss=facts.loss,
                target=facts.target,
                steps=step,
                engine=engine.name,
                hardware=engine.hardware,
                temperature=float(options.temperature),
                num_draft_tokens=depths,
                concurrency=concurrency,
                num_requests=options.num_requests,
                num_tokens=speed.num_tokens,
                tokens_per_second=speed.tokens_per_second,
                median_ms_per_token=1000 * speed.quantile(50),
                p95_ms_per_token=1000 * speed.quantile(95),
                protocol=json.dumps(protocol, sort_keys=True),
            )
        )
    return rows


def _requests(target: Target, benchmarks: Sequence[Benchmark], options: ThroughputOptions) -> list[Request]:
    """First turns, one of each benchmark in turn, again from the first when they end."""
    questions = [
        (f"{benchmark.name}/{prompt.id}", prompt.system_prompt, prompt.turns[0])
        for group in itertools.zip_longest(*([(b, p) for p in b.prompts(None)] for b in benchmarks))
        for benchmark, prompt in filter(None, group)
    ]
    requests = []
    for number, (name, system, text) in enumerate(itertools.islice(itertools.cycle(questions), options.num_requests)):
        messages = [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": text}]
        requests.append(Request(f"{name}#{number}", 0, target.prompt_ids(messages), options.max_new_tokens))
    return requests
