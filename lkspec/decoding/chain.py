"""Batched, lossless chain decoding: the draft proposes K tokens a row, the target verifies them in one forward pass.

With ``draft=None`` the same loop is the target's own cached decoding, the baseline of every comparison.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lkspec.decoding.rejection import verify_round
from lkspec.decoding.sampling import Sampling, invert_cdf, row_generator
from lkspec.drafts.base import Draft
from lkspec.kv_cache import PositionCache
from lkspec.targets.base import Target
from lkspec.types import FreshStates, Proposal, Round, TargetStates, stack_rows
from lkspec.vocab import DraftVocab

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


@dataclass
class _Row:
    request: Request
    generator: torch.Generator
    tokens: list[int] = field(default_factory=list)
    writers: list[int] = field(default_factory=list)
    rounds: list[tuple[int, int]] = field(default_factory=list)
    finish_reason: str | None = None


class ChainDecoder:
    """Decodes requests in a batch of rows; a finished row is refilled with the next request.

    Args:
        target: verifies.
        draft: proposes; None decodes with the target alone.
        sampling: temperature and filters.
        num_draft_tokens: K (0 without a draft).
        batch_size: rows decoded together; results do not depend on it.
        seed: of all random numbers.

    Raises:
        ValueError: K out of the draft's range, batch_size < 1, or (from ``run``) a prompt that leaves no room in the
            context.
    """

    def __init__(
        self,
        target: Target,
        draft: Draft | None,
        *,
        sampling: Sampling,
        num_draft_tokens: int,
        batch_size: int,
        seed: int = 0,
    ) -> None:
        if draft is not None:
            draft.check_num_draft_tokens(num_draft_tokens)
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        self.target, self.draft, self.sampling = target, draft, sampling
        self.num_draft_tokens = num_draft_tokens if draft is not None else 0
        self.batch_size = batch_size
        self.seed = seed
        self.vocab = draft.vocab if draft is not None else DraftVocab.full(target.vocab_size)
        self._eos = frozenset(target.eos_ids)

    @torch.inference_mode()
    def run(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Yields completions as they finish (not in the order of the requests)."""
        waiting = deque(requests)
        batch: _Batch | None = None
        while waiting or batch is not None:
            if batch is None:
                batch = _Batch(self, min(self.batch_size, len(waiting)))
                for slot in range(len(batch.rows)):
                    batch.fill(slot, self._new_row(waiting.popleft()))
            else:
                batch.round()
            while ended := batch.take_finished():
                for slot, row in ended:
                    yield _completion(row, self.num_draft_tokens)
                    if waiting:
                        batch.fill(slot, self._new_row(waiting.popleft()))
            batch = batch.compacted()

    def _new_row(self, request: Request) -> _Row:
        room = self.target.max_positions - len(request.tokens)
        if not request.tokens or room < 1 or request.max_new_tokens < 1:
            raise ValueError(
                f"prompt {request.prompt_id!r} (turn {request.turn}): {len(request.tokens)} tokens and "
                f"max_new_tokens={request.max_new_tokens} do not fit the target's context of "
                f"{self.target.max_positions}; shorten the prompt or lower max_new_tokens"
            )
        return _Row(request, row_generator(self.seed, request.prompt_id, request.turn))


class _Batch:
    """The rows that are decoded together, their caches, and what the draft has not seen yet."""

    def __init__(self, decoder: ChainDecoder, num_rows: int) -> None:
        self.decoder = decoder
        self.rows: list[_Row | None] = [None] * num_rows  # None: an idle slot computes, but nothing is read from it
        self.target_cache = decoder.target.new_cache(num_rows)
        self.draft_cache = decoder.draft.new_cache(num_rows) if decoder.draft is not None else PositionCache(num_rows)
        self._fresh: list[_FreshRow] = []

    def fill(self, slot: int, row: _Row) -> None:
        """Prefills one row: the target reads the prompt and samples its first token, the draft observes."""
        target, draft = self.decoder.target, self.decoder.draft
        prompt = torch.tensor([row.request.tokens], device=target.device)
        positions = torch.arange(prompt.shape[1], device=target.device)[None]
        cache = target.new_cache(1)
        states = target.step(prompt, positions, cache)
        self.target_cache.copy_row(slot, cache, 0, prompt.shape[1])
        probs = self.decoder.sampling.target_probs(target.head.logits(states.last[:, -1]))
        token = invert_cdf(probs, self._uniforms([row], 1)[:, 0])
        if draft is not None:
            draft_cache = draft.new_cache(1)
            fresh = FreshStates(
                next_tokens=torch.cat([prompt[:, 1:], token[:, None]], dim=1),
                positions=positions,
                states=states,
                lengths=torch.tensor([prompt.shape[1]], device=target.device),
            )
            draft.observe(draft_cache, fresh)
            self.draft_cache.copy_row(slot, draft_cache, 0, prompt.shape[1])
        self.rows[slot] = row
        fresh_row = _FreshRow(token, positions[0, -1:], states.aux[0, -1:], states.last[0, -1:])
        self._fresh[slot : slot + 1] = [fresh_row]
        self._append(row, [int(token)], [PREFILL])

    def round(self) -> None:
        """Drafts K tokens a row, verifies them and appends what was accepted and the bonus token."""
        decoder, num_depths = self.decoder, self.decoder.num_draft_tokens
        uniforms = self._uniforms(self.rows, 2 * num_depths + 1)
        fresh = self._fresh_states()
        anchors = fresh.positions.gather(1, fresh.lengths[:, None] - 1)
        last_tokens = fresh.next_tokens.gather(1, fresh.lengths[:, None] - 1)
        proposal = self._draft(fresh, uniforms[:, :num_depths])
        tokens = torch.cat([last_tokens, proposal.tokens], dim=1)
        positions = anchors + 1 + torch.arange(num_depths + 1, device=anchors.device)
        # Past the context limit there is nothing to verify; such rows end in this round whatever is drafted.
        positions = positions.clamp(max=decoder.target.max_positions - 1)
        states = decoder.target.step(tokens, positions, self.target_cache)
        probs = decoder.sampling.target_probs(decoder.target.head.logits(states.last))
        verdict = verify_round(proposal, probs, uniforms[:, num_depths:], decoder.vocab)
        self._advance(tokens, positions, states, verdict.num_accepted.tolist(), verdict.bonus)

    def _draft(self, fresh: FreshStates, uniforms: Float[Tensor, "B K"]) -> Proposal:
        num_rows, num_depths = uniforms.shape
        draft, sampling = self.decoder.draft, self.decoder.sampling
        if draft is None:
            empty = torch.zeros(num_rows, 0, dtype=torch.int64, device=uniforms.device)
            return Proposal(tokens=empty, probs=uniforms.new_zeros(num_rows, 0, self.decoder.vocab.size))
        probs: list[Tensor] = []

        def sample(logits: Float[Tensor, "B D"]) -> Int[Tensor, " B"]:
            q = sampling.draft_probs(logits)
            probs.append(q)
            return invert_cdf(q, uniforms[:, len(probs) - 1])

        tokens = draft.propose(self.draft_cache, fresh, sample, num_depths)
        return Proposal(tokens=tokens, probs=torch.stack(probs, dim=1))

    def _advance(
        self, tokens: Tensor, positions: Tensor, states: TargetStates, num_accepted: list[int], bonus: Tensor
    ) -> None:
        for slot, row in enumerate(self.rows):
            count = num_accepted[slot]
            if row is None:
                continue
            row.rounds.append((len(row.tokens), count))
            new = [*tokens[slot, 1 : 1 + count].tolist(), int(bonus[slot])]
            self._fresh[slot] = _FreshRow(
                next_tokens=torch.cat([tokens[slot, 1 : 1 + count], bonus[slot : slot + 1]]),
                positions=positions[slot, : 1 + count],
                aux=states.aux[slot, : 1 + count],
                last=states.last[slot, : 1 + count],
            )
            self._append(row, new, [*range(1, count + 1), BONUS])

    def _append(self, row: _Row, tokens: list[int], writers: list[int]) -> None:
        """Extends the text up to end-of-text, the request's limit or the context limit."""
        limit = min(row.request.max_new_tokens, self.decoder.target.max_positions - len(row.request.tokens))
        for token, writer in zip(tokens, writers, strict=True):
            row.tokens.append(token)
            row.writers.append(writer)
            if token in self.decoder._eos:
                row.finish_reason = "stop"
            elif len(row.tokens) == limit:
                row.finish_reason = "length"
            if row.finish_reason is not None:
                return

    def _fresh_states(self) -> FreshStates:
        rows = self._fresh
        return FreshStates(
            next_tokens=stack_rows(row.next_tokens for row in rows),
            positions=_stack_positions(rows),
            states=TargetStates(aux=stack_rows(row.aux for row in rows), last=stack_rows(row.last for row in rows)),
            lengths=torch.tensor([len(row.positions) for row in rows], device=self.decoder.target.device),
        )

    def _uniforms(self, rows: Sequence[_Row | None], count: int) -> Float[Tensor, "B count"]:
        """As many numbers a row and round whatever is accepted, so that runs can be paired."""
        idle = torch.zeros(count, dtype=torch.float64)
        drawn = [
            idle if row is None else torch.rand(count, generator=row.generator, dtype=torch.float64) for row in rows
        ]
        return torch.stack(drawn).to(self.decoder.target.device)

    def take_finished(self) -> list[tuple[int, _Row]]:
        """Removes and returns the rows that have ended, with their slots."""
        ended = [(slot, row) for slot, row in enumerate(self.rows) if row is not None and row.finish_reason is not None]
        for slot, _ in ended:
            self.rows[slot] = None
        return ended

    def compacted(self) -> _Batch | None:
        """The batch without idle slots once they are half of it; None when no row is left."""
        busy = [slot for slot, row in enumerate(self.rows) if row is not None]
        if not busy:
            return None
        if 2 * len(busy) <= len(self.rows):
            self.rows = [self.rows[slot] for slot in busy]
            self._fresh = [self._fresh[slot] for slot in busy]
            self.target_cache.keep(busy)
            self.draft_cache.keep(busy)
        return self


@dataclass(frozen=True)
class _FreshRow:
    next_tokens: Int[Tensor, " S"]
    positions: Int[Tensor, " S"]
    aux: Float[Tensor, "S AH"]
    last: Float[Tensor, "S H"]


def _stack_positions(rows: list[_FreshRow]) -> Int[Tensor, "B S"]:
    """Padding slots lie right behind the real ones: depths drafted next overwrite them before any query sees them."""
    width = max(len(row.positions) for row in rows)
    steps = torch.arange(width, device=rows[0].positions.device)
    return torch.stack([row.positions[0] + steps for row in rows])


def _completion(row: _Row, num_draft_tokens: int) -> Completion:
    assert row.finish_reason is not None
    rounds = tuple(
        Round(position=position, accepted=accepted, past_end=position + num_draft_tokens > len(row.tokens))
        for position, accepted in row.rounds
    )
    return Completion(
        request=row.request,
        tokens=tuple(row.tokens),
        writers=tuple(row.writers),
        finish_reason=row.finish_reason,
        rounds=rounds if num_draft_tokens > 0 else (),
    )
