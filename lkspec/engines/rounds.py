"""What serving engines tell of rounds: how many there were and how many tokens each accepted, not where they were."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from lkspec.decoding.chain import Request
from lkspec.types import Round

_NO_POSITION = -1


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
