"""The statistics of a batch: where the draft's proposals, the target's distributions and the losses meet."""

from __future__ import annotations

from typing import Any

from lkspec.drafts.base import Draft
from lkspec.losses.fused.token_stats import token_stats
from lkspec.types import Batch, LinearHead, TargetStates, TokenStats


def draft_stats(
    draft: Draft,
    batch: Batch,
    states: TargetStates,
    target_head: LinearHead,
    *,
    num_depths: int | None = None,
    sharpness: float = 1.0,
    **options: Any,
) -> TokenStats:
    """Statistics of every supervised token of a batch, of q^sharpness; ``options`` as in ``token_stats``."""
    hidden = draft.unroll(batch, states, num_depths)
    return token_stats(
        hidden,
        [draft.head(depth).sharpened(sharpness) for depth in range(1, len(hidden) + 1)],
        states.last,
        target_head,
        draft.vocab,
        batch.tokens,
        batch.as_made.depth_mask(len(hidden)),
        target_summary=states.summary,
        **options,
    )
