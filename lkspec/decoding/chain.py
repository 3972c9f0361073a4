"""Batched, lossless chain decoding: the draft proposes K tokens a row, the target verifies them in one forward pass.

With ``draft=None`` the same loop is the target's own cached decoding, the baseline of every comparison.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

import torch

from lkspec.decoding.batch import DecodingBatch
from lkspec.decoding.rows import BONUS, PREFILL, Completion, Continuation, Request
from lkspec.decoding.sampling import Sampling, row_generator
from lkspec.drafts.base import Draft
from lkspec.targets.base import Target

__all__ = ["BONUS", "PREFILL", "ChainDecoder", "Completion", "Request"]


class ChainDecoder:
    """Decodes requests in a batch of rows; a finished row is refilled with the next request, or dropped.

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
        self._eos = frozenset(target.eos_ids)

    @torch.inference_mode()
    def run(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Yields completions as they finish (not in the order of the requests)."""
        waiting = deque(requests)
        if not waiting:
            return
        size = min(self.batch_size, len(waiting))
        batch = DecodingBatch(self.target, self.draft, self.sampling, self.num_draft_tokens, size)
        free = list(range(size))
        while free or batch.rows:
            admitted = [self._new_row(waiting.popleft()) for _ in free[: len(waiting)]]
            batch.fill(free[: len(admitted)], admitted)
            batch.drop(free[len(admitted) :])
            if batch.rows and not batch.finished:  # the prefill itself can end a text
                batch.round()
            free = batch.finished
            yield from (batch.rows[slot].completion(self.num_draft_tokens) for slot in free)

    def _new_row(self, request: Request) -> Continuation:
        room = self.target.max_positions - len(request.tokens)
        if not request.tokens or room < 1 or request.max_new_tokens < 1:
            raise ValueError(
                f"prompt {request.prompt_id!r} (turn {request.turn}): {len(request.tokens)} tokens and "
                f"max_new_tokens={request.max_new_tokens} do not fit the target's context of "
                f"{self.target.max_positions}; shorten the prompt or lower max_new_tokens"
            )
        generator = row_generator(self.seed, request.prompt_id, request.turn)
        return Continuation(request, generator, limit=min(request.max_new_tokens, room), eos_ids=self._eos)
