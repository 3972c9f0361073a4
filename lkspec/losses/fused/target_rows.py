"""The target's side of a chunk: from products with its head to p over the draft vocabulary, which all depths read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lkspec.losses.divergences import LOG_ZERO
from lkspec.losses.fused.head_summary import summarise
from lkspec.losses.fused.logits import Logits, Scratch, blocks, softmax_into
from lkspec.losses.target_filter import TargetFilter
from lkspec.types import HeadSummary
from lkspec.vocab import DraftVocab


class TargetRows(NamedTuple):
    """The target's side of rows, shared by all depths.

    Attributes:
        log_renormed: log p~, at least LOG_ZERO.
        log_coverage: log of p's mass over the draft vocabulary; -inf where there is none.
        top1: target id of argmax p over the full vocabulary; None where only the draft vocabulary was read.
        kept: p; None where each block computes it again, which a single depth does: memory matters more than an exp.
    """

    log_renormed: Float[Tensor, "R D"]
    log_coverage: Float[Tensor, " R"]
    top1: Int[Tensor, " R"] | None
    kept: Float[Tensor, "R D"] | None

    def probs(self, block: slice, scratch: Scratch) -> Float[Tensor, "r D"]:
        """p of a block."""
        if self.kept is not None:
            return self.kept[block]
        log_renormed = self.log_renormed[block]
        probs = torch.softmax(log_renormed, -1, out=scratch("probs", *log_renormed.shape))
        return probs.mul_(self.log_coverage[block, None].exp())

    def logp(self, rows: slice | Tensor) -> Float[Tensor, "r D"]:
        """log p of some rows, -inf where p~ is 0."""
        inside = self.log_renormed[rows]
        if inside.amin() <= LOG_ZERO:
            inside = inside.masked_fill(inside <= LOG_ZERO, -torch.inf)
        return inside + self.log_coverage[rows, None]


def read_target(
    logits: Logits, vocab: DraftVocab, target_filter: TargetFilter, scratch: Scratch, *, keep_probs: bool = False
) -> TargetRows:
    """Statistics of p from logits over the target vocabulary, which a full draft vocabulary overwrites.

    Args:
        logits, vocab, target_filter, scratch: of whole rows.
        keep_probs: keep p for the depths to come.
    """
    num_rows = len(logits.product)
    top1 = logits.product.new_empty(num_rows, dtype=torch.int64)
    log_coverage = logits.product.new_zeros(num_rows, dtype=scratch.dtype)
    log_renormed = _place_of_logs(logits, vocab.size, scratch)
    kept = scratch("kept", num_rows, vocab.size) if keep_probs else None
    for block in blocks(logits.product):
        values = target_filter(logits.values(block, scratch.dtype))
        place = log_coverage[block], log_renormed[block], None if kept is None else kept[block]
        if vocab.is_full:
            top1[block] = _renormalise(values, *place, scratch)[1]
        else:
            normaliser, top1[block] = softmax_into(values, scratch("whole", *values.shape))
            inside = vocab.restrict(values)
            log_coverage[block].masked_fill_(inside.amax(-1).isneginf(), -torch.inf)
            log_sum, _ = _renormalise(inside, *place, scratch)
            log_coverage[block] += log_sum - normaliser
    return _target_rows(log_renormed, log_coverage, top1, kept)


def read_target_pieces(
    pieces: Iterable[tuple[slice, Logits]],
    num_rows: int,
    vocab: DraftVocab,
    scratch: Scratch,
    *,
    keep_probs: bool = False,
) -> TargetRows:
    """The same of a truncated draft vocabulary and an unfiltered target, without the wide logits.

    Args:
        pieces: logits over a slice of the target vocabulary, in order, each valid until the next is asked for.
        num_rows, vocab, scratch, keep_probs: as above.
    """
    log_renormed = scratch("log_renormed", num_rows, vocab.size)
    read = 0

    def take(columns: slice, values: Float[Tensor, "R w"]) -> None:
        nonlocal read
        inside = vocab.ids[read : read + int(vocab.t2d[columns].sum())] - columns.start
        torch.index_select(values, 1, inside, out=log_renormed[:, read : read + len(inside)])
        read += len(inside)

    summary = summarise(pieces, num_rows, scratch, take)
    return _read_inside(log_renormed.__getitem__, log_renormed, summary, scratch, keep_probs=keep_probs)


def read_target_inside(
    logits: Logits, summary: HeadSummary, scratch: Scratch, *, keep_probs: bool = False
) -> TargetRows:
    """The same of an unfiltered target, from logits over the draft vocabulary alone, which it overwrites.

    Args:
        logits, scratch, keep_probs: as above.
        summary: log-normaliser and argmax of all the target's logits of the rows.
    """
    log_renormed = _place_of_logs(logits, logits.product.shape[1], scratch)
    return _read_inside(
        lambda block: logits.values(block, scratch.dtype), log_renormed, summary, scratch, keep_probs=keep_probs
    )


def _read_inside(
    inside: Callable[[slice], Float[Tensor, "r D"]],
    log_renormed: Float[Tensor, "R D"],
    summary: HeadSummary,
    scratch: Scratch,
    *,
    keep_probs: bool,
) -> TargetRows:
    """From the logits of a block over the draft vocabulary, which may lie where ``log_renormed`` will."""
    log_coverage = torch.zeros_like(summary.log_normaliser)
    kept = scratch("kept", *log_renormed.shape) if keep_probs else None
    for block in blocks(log_renormed):
        values = inside(block)
        log_coverage[block].masked_fill_(values.amax(-1).isneginf(), -torch.inf)
        place = log_coverage[block], log_renormed[block], None if kept is None else kept[block]
        log_sum, _ = _renormalise(values, *place, scratch)
        # The normaliser may come from a product of other precision: coverage is still at most 1.
        log_coverage[block] += (log_sum - summary.log_normaliser[block]).clamp(max=0.0)
    return _target_rows(log_renormed, log_coverage, summary.argmax, kept)


def read_target_columns(
    logits: Logits, log_coverage: Float[Tensor, " R"], scratch: Scratch, *, keep_probs: bool = False
) -> TargetRows:
    """The same, without top1, from logits over the draft vocabulary alone, which it overwrites."""
    num_rows, width = logits.product.shape
    log_renormed = _place_of_logs(logits, width, scratch)
    kept = scratch("kept", num_rows, width) if keep_probs else None
    for block in blocks(logits.product):
        place = log_coverage[block], log_renormed[block], None if kept is None else kept[block]
        _renormalise(logits.values(block, scratch.dtype), *place, scratch)
    return _target_rows(log_renormed, log_coverage, None, kept)


def _place_of_logs(logits: Logits, width: int, scratch: Scratch) -> Float[Tensor, "R D"]:
    if logits.product.shape[1] == width and logits.product.dtype == scratch.dtype:
        return logits.product
    return scratch("log_renormed", len(logits.product), width)


def _renormalise(
    inside: Float[Tensor, "r D"],
    log_coverage: Float[Tensor, " r"],
    out: Float[Tensor, "r D"],
    renormed: Float[Tensor, "r D"] | None,
    scratch: Scratch,
) -> tuple[Float[Tensor, " r"], Int[Tensor, " r"]]:
    """log p~, and p~ where asked for, of rows that have mass in the draft vocabulary; returns logsumexp and argmax."""
    lost = log_coverage.isneginf()
    if lost.any():
        inside = inside.masked_fill(lost[:, None], 0.0)
    log_sum, best = softmax_into(inside, scratch("probs", *inside.shape) if renormed is None else renormed)
    torch.sub(inside, log_sum[:, None], out=out).clamp_(min=LOG_ZERO)
    return log_sum, best


def _target_rows(
    log_renormed: Float[Tensor, "R D"],
    log_coverage: Float[Tensor, " R"],
    top1: Int[Tensor, " R"] | None,
    renormed: Float[Tensor, "R D"] | None,
) -> TargetRows:
    kept = None if renormed is None else renormed.mul_(log_coverage.exp()[:, None])
    return TargetRows(log_renormed, log_coverage, top1, kept)
