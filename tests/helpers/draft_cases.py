"""Every draft with what the contracts say of it, and the batches they are tested on. A new draft is one more case."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lkspec.drafts.base import Draft
from lkspec.drafts.eagle3 import Eagle3
from lkspec.drafts.medusa import Medusa
from lkspec.drafts.mlp import MLPSpeculator
from lkspec.drafts.mtp import MTP
from lkspec.types import Batch, TargetSpec, TargetStates, stack_rows
from lkspec.vocab import DraftVocab


@dataclass(frozen=True)
class Case:
    """One draft.

    Attributes:
        reads: which of the target's states, ``aux`` or ``last``.
        reads_token: whether token ``slot`` enters the output at (slot, anchor, depth).
        reads_state: whether the state of ``slot`` enters the output at (slot, anchor).
        independent_depths: whether each depth has weights of its own, so that there are no more than were trained.
        shared: the target's tables that it uses as they are.
    """

    architecture: type[Draft]
    reads: str
    reads_token: Callable[[int, int, int], bool]
    reads_state: Callable[[int, int], bool]
    independent_depths: bool
    shared: frozenset[str] = frozenset()
    options: Mapping[str, Any] = field(default_factory=dict)


def _text(slot: int, anchor: int, depth: int) -> bool:
    """x_1 .. x_{t+k}: the entry of anchor j reads x_{j+1}, and x_0 is in the states only."""
    return 1 <= slot <= anchor + depth


def _after_anchor(slot: int, anchor: int, depth: int) -> bool:
    return anchor < slot <= anchor + depth


def _no_token(slot: int, anchor: int, depth: int) -> bool:
    return False


def _states_so_far(slot: int, anchor: int) -> bool:
    return slot <= anchor


def _state_of_anchor(slot: int, anchor: int) -> bool:
    return slot == anchor


_EAGLE3 = (Eagle3, "aux", _text, _states_so_far, False, frozenset({"embedding"}))
_MEDUSA = (Medusa, "last", _no_token, _state_of_anchor, True, frozenset[str]())
_MLP = (MLPSpeculator, "last", _after_anchor, _state_of_anchor, True)
_MTP = (MTP, "last", _text, _states_so_far, False, frozenset({"embedding", "head"}))
_TIED = {"embeddings": "learned", "tie_weights": True, "scale_input": True, "inner_dim": 40}

CASES = {
    "eagle3": Case(*_EAGLE3),
    "eagle3_norm_first": Case(*_EAGLE3, options={"norm_before_residual": True}),
    "medusa": Case(*_MEDUSA, options={"head_init": "target"}),
    "medusa_deep": Case(*_MEDUSA, options={"num_layers": 2, "bias": True}),
    "mlp": Case(*_MLP, frozenset({"embedding"}), options={"head_init": "target"}),
    "mlp_tied": Case(*_MLP, options=_TIED),
    "mtp": Case(*_MTP),
}


def make_draft(
    case: Case, spec: TargetSpec, vocab: DraftVocab | None = None, *, num_depths: int = 3, seed: int = 0
) -> Draft:
    """A draft whose every parameter is away from its initial value, at which some parts hardly change anything."""
    vocab = vocab or DraftVocab.full(len(spec.embedding))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        draft = case.architecture(spec, vocab, num_depths=num_depths, **case.options)  # type: ignore[call-arg]
        with torch.no_grad():
            for parameter in draft.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return draft


def half_vocab(target_size: int) -> DraftVocab:
    """Every second token."""
    return DraftVocab(torch.arange(1, target_size, 2), target_size)


def random_batch(
    rows: list[list[int]], *, vocab_size: int, aux_size: int, last_size: int, seed: int = 0
) -> tuple[Batch, TargetStates]:
    """Rows of conversations of these lengths, packed and padded on the right, with random tokens and states.

    Padding gets states as well, as a target would give it. All but each conversation's first token is one assistant
    turn.
    """
    generator = torch.Generator().manual_seed(seed)
    positions = stack_rows(torch.cat([torch.arange(n) for n in row]) for row in rows)
    segments = stack_rows(torch.cat([torch.full((n,), i + 1) for i, n in enumerate(row)]) for row in rows)
    tokens = torch.randint(0, vocab_size, positions.shape, generator=generator) * (segments > 0)
    ids = tuple(tuple(f"r{r}s{s}" for s in range(len(row))) for r, row in enumerate(rows))
    aux = torch.randn(*tokens.shape, aux_size, generator=generator)
    last = torch.randn(*tokens.shape, last_size, generator=generator)
    return Batch(tokens, positions, segments, segments * (positions > 0), ids), TargetStates(aux, last)


def batch_for(spec: TargetSpec, rows: list[list[int]]) -> tuple[Batch, TargetStates]:
    """A random batch of a target's sizes."""
    vocab_size, size = spec.embedding.shape
    return random_batch(rows, vocab_size=vocab_size, aux_size=spec.num_aux * size, last_size=size)


def conversation(batch: Batch, states: TargetStates, row: int, segment: int) -> tuple[Batch, TargetStates]:
    """One conversation of a batch, by itself."""
    inside = batch.segments[row] == segment
    tokens, ones = batch.tokens[row, inside][None], torch.ones(1, int(inside.sum()), dtype=torch.int64)
    positions = torch.arange(tokens.shape[1])[None]
    return (
        Batch(tokens, positions, ones, ones * (positions > 0), (("alone",),)),
        TargetStates(states.aux[row, inside][None], states.last[row, inside][None]),
    )


@torch.no_grad()
def unrolled(draft: Draft, batch: Batch, states: TargetStates, num_depths: int | None = None) -> Tensor:
    """``unroll`` without gradients."""
    return draft.unroll(batch, states, num_depths)
