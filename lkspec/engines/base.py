"""What serving engines tell: rounds (how many there were and how many tokens each accepted, not where), and speed."""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from lkspec.decoding.chain import Completion, Request
from lkspec.types import Round

_NO_POSITION = -1


@dataclass(frozen=True)
class OneByOne:
    """Answers requests one after another, so that what an engine counts meanwhile is each request's own."""

    answer: Callable[[Request], Completion]

    def run(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Completions in the order of the requests."""
        return map(self.answer, requests)


@dataclass(frozen=True)
class Speed:
    """A batch of requests, so many at a time.

    Attributes:
        num_tokens: generated, all requests together.
        seconds: from the first request to the end of the last.
        seconds_per_token: of each request that has more than one token, from its first token to its last.
    """

    num_tokens: int
    seconds: float
    seconds_per_token: tuple[float, ...]

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds

    def quantile(self, percent: int) -> float:
        """Seconds per token that so many percent of the requests stay below; nan without any."""
        ordered = sorted(self.seconds_per_token)
        if len(ordered) < 2:
            return ordered[0] if ordered else float("nan")
        return statistics.quantiles(ordered, n=100, method="inclusive")[percent - 1]


def counted_rounds(num_rounds: int, accepted_per_position: Sequence[int]) -> tuple[Round, ...]:
    """The rounds behind an engine's counters: position k counts the rounds in which at least k tokens were accepted."""
    at_least = [num_rounds, *accepted_per_position, 0]
    return rounds_of_histogram([at_least[k] - at_least[k + 1] for k in range(len(at_least) - 1)])


def rounds_of_histogram(histogram: Sequence[int]) -> tuple[Round, ...]:
    """The rounds behind a histogram: entry a counts the rounds in which exactly a tokens were accepted."""
    return tuple(
        Round(position=_NO_POSITION, accepted=accepted, past_end=False)
        for accepted, count in enumerate(histogram)
        for _ in range(count)
    )


def request_seed(seed: int, request: Request) -> int:
    """A seed of 32 bits for each (seed, prompt, turn)."""
    digest = hashlib.sha256(f"{seed} {request.prompt_id} {request.turn}".encode()).digest()
    return int.from_bytes(digest[:4], "little")
