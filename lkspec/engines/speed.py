"""What an engine tells of its speed with many requests under way at once."""

from __future__ import annotations

import statistics
from dataclasses import dataclass


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
