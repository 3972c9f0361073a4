"""What decoding is asked for, what it answers, and one row's text while it grows."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedTokenizerBase

from lkspec.types import Round

PREFILL, BONUS = -1, 0  # who wrote a token; 1..K is the depth at which a drafted one was accepted


@dataclass(frozen=True)
class Request:
    """One prompt to continue; ``(prompt_id, turn)`` and the seed fix its random numbers."""

    prompt_id: str
    turn: int
    tokens: tuple[int, ...]
    max_new_tokens: int


@dataclass(frozen=True)
class Completion:
    """A finished continuation.

    Attributes:
        tokens: generated ids, cut after the first end-of-text token or at the limit.
        writers: who wrote each token: -1 the prefill, 0 a bonus token, k a token drafted at depth k.
        finish_reason: ``stop`` (end-of-text) or ``length``.
        rounds: every verification, in order.
    """

    request: Request
    tokens: tuple[int, ...]
    writers: tuple[int, ...]
    finish_reason: str
    rounds: tuple[Round, ...]

    def text(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """What was generated, without the end-of-text token."""
        return str(tokenizer.decode(self.tokens[:-1] if self.finish_reason == "stop" else self.tokens))


@dataclass
class Continuation:
    """A text in the making.

    Attributes:
        limit: of generated tokens: the request's own, or the room that the context leaves.
        rounds: (index of the first proposed token, accepted) of every round.
        finish_reason: None while it goes on.
    """

    request: Request
    generator: torch.Generator
    limit: int
    eos_ids: Collection[int]
    tokens: list[int] = field(default_factory=list)
    writers: list[int] = field(default_factory=list)
    rounds: list[tuple[int, int]] = field(default_factory=list)
    finish_reason: str | None = None

    def begin(self, token: int) -> None:
        """Writes the token that the prefill sampled."""
        self._append([token], [PREFILL])

    def add_round(self, accepted: Sequence[int], bonus: int) -> None:
        """Notes a round and writes its accepted tokens and the bonus token, up to the end of the text."""
        self.rounds.append((len(self.tokens), len(accepted)))
        self._append([*accepted, bonus], [*range(1, len(accepted) + 1), BONUS])

    def _append(self, tokens: Sequence[int], writers: Sequence[int]) -> None:
        for token, writer in zip(tokens, writers, strict=True):
            self.tokens.append(token)
            self.writers.append(writer)
            if token in self.eos_ids:
                self.finish_reason = "stop"
            elif len(self.tokens) == self.limit:
                self.finish_reason = "length"
            if self.finish_reason is not None:
                return

    def completion(self, num_draft_tokens: int) -> Completion:
        """The finished text; rounds without drafted tokens are none."""
        assert self.finish_reason is not None
        rounds = tuple(
            Round(position=position, accepted=accepted, past_end=position + num_draft_tokens > len(self.tokens))
            for position, accepted in self.rounds
        )
        return Completion(
            request=self.request,
            tokens=tuple(self.tokens),
            writers=tuple(self.writers),
            finish_reason=self.finish_reason,
            rounds=rounds if num_draft_tokens > 0 else (),
        )
