"""Statistics of (target p, draft q) pairs: the readable form, on logits, that every faster form must agree with.

One primitive serves every objective (contract 3): kl, reverse_kl and log_alpha carry gradients to the draft, the
others are for measuring. All names and shapes are those of ``TokenStats``; shape letters are those of ``types.py``.

What infinities mean here: a target logit may be -inf (p_v = 0, e.g. a point mass or a filtered target). Nothing is
NaN then, and every loss and gradient stays finite; where the true value is infinite (reverse KL against p~_v = 0, and
-log alpha of a row with no target mass inside the draft vocabulary), log 0 counts as ``LOG_ZERO``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lkspec.types import LinearHead, TokenStats
from lkspec.vocab import DraftVocab

#: Stands for log 0 where a finite number is needed: its exp is 0 in float32 and in float64.
LOG_ZERO = -1e4

#: A form (b) objective: (logp, logq) [*rows, D] -> [*rows]; p has its full-vocabulary denominator and may hold -inf.
RowValue = Callable[[Float[Tensor, "*rows D"], Float[Tensor, "*rows D"]], Float[Tensor, "*rows"]]


def logit_stats(
    draft_logits: Float[Tensor, "*rows D"],
    target_logits: Float[Tensor, "*rows V"],
    tokens: Int[Tensor, "*rows"],
    vocab: DraftVocab,
    *,
    temperature: float = 1.0,
    row_value: RowValue | None = None,
) -> dict[str, Float[Tensor, "*rows"]]:
    """Statistics of rows of logits, by the names of ``TokenStats`` fields (``row_value`` only where one is given).

    With ``p = softmax(z_p / temperature)`` over V, ``p~`` = p restricted to D and renormalised, and
    ``q = softmax(z_q / temperature)`` over D::

        kl = sum_D p~ (log p~ - log q)                  reverse_kl = sum_D q (log q - log p~)
        log_alpha = logsumexp_D min(log p, log q)       accept_prob = min(1, q(x) / p(x)), 0 for x outside D
        top1 = [argmax q is argmax p]                   hit = [argmax q is x]
        coverage = sum_D p

    Computed in float32 or the logits' own wider type; no gradient reaches the target. Where p_v = q_v exactly, the
    gradient of log_alpha takes min(p_v, q_v) to be p_v, as in ``M_v = 1[q_v < p_v]``. A row whose target has no mass
    in D at all gives kl = reverse_kl = 0 and log_alpha = LOG_ZERO, with zero gradient.

    Args:
        draft_logits: z_q, over the draft vocabulary.
        target_logits: z_p, over the target vocabulary; -inf allowed.
        tokens: the text's own token x, as target ids.
        vocab: which target tokens the draft can propose.
        temperature: divides both logits.
        row_value: a form (b) objective.

    Raises:
        ValueError: a temperature that is not positive.
    """
    _check_temperature(temperature)
    with torch.no_grad():
        target = _target_rows(target_logits, tokens, vocab, temperature)
    return _row_stats(draft_logits, target, vocab, temperature, row_value)


def token_stats(
    hidden: Float[Tensor, "K B T H"],
    heads: Sequence[LinearHead],
    target_hidden: Float[Tensor, "B T Ht"],
    target_head: LinearHead,
    vocab: DraftVocab,
    tokens: Int[Tensor, "B T"],
    mask: Bool[Tensor, "K B T"],
    *,
    temperature: float = 1.0,
    row_value: RowValue | None = None,
    chunk_size: int = 1024,
    recompute: bool = False,
) -> TokenStats:
    """Statistics of every supervised (depth, row, anchor), from hidden states.

    Equivalent to, wherever ``mask[k-1, b, t]`` is set (0-based t)::

        logit_stats(heads[k-1].logits(hidden[k-1, b, t]), target_head.logits(target_hidden[b, t + k]),
                    tokens[b, t + k + 1], vocab)

    but it walks over chunks of TARGET rows: row r serves anchor r - k at every depth k, so the target's logits are
    computed once for all K depths, and only for rows that some depth needs. Where the mask is 0 the statistics and
    the gradients are exactly zero, whatever the hidden states hold there.

    Args:
        hidden: the draft's hidden states, which multiply its heads.
        heads: entry k - 1 for depth k; may be one object repeated.
        target_hidden: ``TargetStates.last``.
        target_head: the target's head.
        vocab: which target tokens the draft can propose.
        tokens: the text, as target ids.
        mask: ``Batch.depth_mask(K)``, or a part of it.
        temperature: divides both logits.
        row_value: a form (b) objective; its values land in ``TokenStats.row_value``.
        chunk_size: target rows a chunk.
        recompute: compute a chunk's logits again in backward, so that none survives its chunk; otherwise [rows, D]
            activations of all chunks are kept, which is faster while they fit.

    Raises:
        ValueError: heads that are not one a depth, a chunk size below 1, a temperature that is not positive.
    """
    check_arguments(hidden, heads, chunk_size, temperature)
    served = served_rows(mask)
    # Masked-off entries become zeros BEFORE any arithmetic, so that a NaN there meets neither a value nor a gradient.
    picked = hidden.flatten(0, 2).index_select(0, served.anchors.flatten()).unflatten(0, served.needed.shape)
    picked = picked.masked_fill(~served.needed[..., None], 0.0)
    chunk_stats = partial(
        _chunk_stats, heads=heads, target_head=target_head, vocab=vocab, temperature=temperature, row_value=row_value
    )
    if recompute:
        chunk_stats = partial(checkpoint, chunk_stats, use_reentrant=False, preserve_rng_state=False)
    # split, not slices: the backward of a slice would fill a gradient of full size once a chunk.
    chunks = [
        chunk_stats(*pieces)
        for pieces in zip(
            picked.split(chunk_size, dim=1),
            target_hidden.flatten(0, 1)[served.rows].split(chunk_size),
            tokens.flatten()[served.rows + 1].split(chunk_size),
            strict=True,
        )
    ]
    placed = {name: served.place(torch.cat([chunk[name] for chunk in chunks], dim=1), mask) for name in chunks[0]}
    return TokenStats(mask=mask, **placed)


class ServedRows(NamedTuple):
    """The target rows that some depth needs.

    Attributes:
        rows: flat index b * T + r of each.
        needed: whether depth k needs the row.
        anchors: flat index into [K, B, T] of the anchor r - k that the row serves; 0 where it is not needed.
    """

    rows: Int[Tensor, " R"]
    needed: Bool[Tensor, "K R"]
    anchors: Int[Tensor, "K R"]

    def place(self, values: Float[Tensor, "K R"], mask: Bool[Tensor, "K B T"]) -> Float[Tensor, "K B T"]:
        """Moves values from target rows to their anchors; zeros elsewhere."""
        values = values.masked_fill(~self.needed, 0.0)
        flat = values.new_zeros(mask.numel()).index_add(0, self.anchors.flatten(), values.flatten())
        return flat.view(mask.shape)


def served_rows(mask: Bool[Tensor, "K B T"]) -> ServedRows:
    """The target rows behind a mask [k-1, b, t] of anchors."""
    num_depths = len(mask)
    at_target = torch.zeros_like(mask)  # [k-1, b, r] = mask[k-1, b, r - k]
    for depth in range(1, num_depths + 1):
        at_target[depth - 1, :, depth:] = mask[depth - 1, :, :-depth]
    rows = at_target.any(0).flatten().nonzero().squeeze(1)
    needed = at_target.flatten(1)[:, rows]
    inside = needed.sum() == mask.sum() and not at_target[..., -1].any()
    assert inside, "mask: a proposed token lies past the end of its row"
    depths = torch.arange(num_depths, device=mask.device)[:, None]
    anchors = depths * mask[0].numel() + rows - (depths + 1)
    return ServedRows(rows, needed, anchors.masked_fill(~needed, 0))


class _TargetRows(NamedTuple):
    """The target's side of rows, shared by all depths.

    Attributes:
        logp: log p over the draft vocabulary, with the full-vocabulary denominator; may hold -inf.
        log_renormed: log p~, LOG_ZERO where p is 0.
        coverage: sum of p over the draft vocabulary.
        reachable: whether p has any mass there.
        top1: target id of argmax p over the full vocabulary.
        tokens: target id of the text's own token.
    """

    logp: Float[Tensor, "*rows D"]
    log_renormed: Float[Tensor, "*rows D"]
    coverage: Float[Tensor, "*rows"]
    reachable: Bool[Tensor, "*rows"]
    top1: Int[Tensor, "*rows"]
    tokens: Int[Tensor, "*rows"]


def _target_rows(
    logits: Float[Tensor, "*rows V"], tokens: Int[Tensor, "*rows"], vocab: DraftVocab, temperature: float
) -> _TargetRows:
    logits = _tempered(logits, temperature)
    logp = vocab.restrict(logits) - logits.logsumexp(-1, keepdim=True)
    log_coverage = logp.logsumexp(-1)
    reachable = log_coverage > -torch.inf
    log_renormed = logp - log_coverage.masked_fill(~reachable, 0.0)[..., None]
    log_renormed = log_renormed.masked_fill_(log_renormed.isneginf(), LOG_ZERO)
    return _TargetRows(logp, log_renormed, log_coverage.exp(), reachable, logits.argmax(-1), tokens)


def _row_stats(
    draft_logits: Float[Tensor, "*rows D"],
    target: _TargetRows,
    vocab: DraftVocab,
    temperature: float,
    row_value: RowValue | None,
) -> dict[str, Float[Tensor, "*rows"]]:
    logq = _tempered(draft_logits, temperature).log_softmax(-1)
    log_ratio = target.log_renormed - logq
    kl = (target.log_renormed.exp() * log_ratio).sum(-1)
    reverse_kl = -(logq.exp() * log_ratio).sum(-1)
    # `where`, not `minimum`, whose gradient splits ties; it also keeps a row of -inf from sending NaN to logq.
    log_overlap = torch.where(logq < target.logp, logq, target.logp)
    draft_ids = vocab.to_draft(target.tokens)
    at_token = draft_ids.clamp(min=0)[..., None]
    log_accept = (logq.gather(-1, at_token) - target.logp.gather(-1, at_token)).squeeze(-1).clamp(max=0.0)
    proposed = vocab.to_target(logq.argmax(-1))
    stats = {
        "kl": kl,
        "reverse_kl": reverse_kl.masked_fill(~target.reachable, 0.0),
        "log_alpha": log_overlap.logsumexp(-1).masked_fill(~target.reachable, LOG_ZERO),
        "accept_prob": log_accept.exp().masked_fill(draft_ids < 0, 0.0),
        "top1": (proposed == target.top1).to(logq.dtype),
        "hit": (proposed == target.tokens).to(logq.dtype),
        "coverage": target.coverage,
    }
    if row_value is not None:
        stats["row_value"] = row_value(target.logp, logq)
    return stats


def _chunk_stats(
    hidden: Float[Tensor, "K R H"],
    target_hidden: Float[Tensor, "R Ht"],
    tokens: Int[Tensor, " R"],
    *,
    heads: Sequence[LinearHead],
    target_head: LinearHead,
    vocab: DraftVocab,
    temperature: float,
    row_value: RowValue | None,
) -> dict[str, Float[Tensor, "K R"]]:
    with torch.no_grad():
        target = _target_rows(target_head.logits(target_hidden), tokens, vocab, temperature)
    # One depth at a time, shared head or not: a matmul of hundreds of rows is already as fast as one K times as wide,
    # whose temporaries would be K times as large.
    depths = [
        _row_stats(head.logits(rows), target, vocab, temperature, row_value)
        for head, rows in zip(heads, hidden, strict=True)
    ]
    return {name: torch.stack([depth[name] for depth in depths]) for name in depths[0]}


def _tempered(logits: Float[Tensor, "*rows W"], temperature: float) -> Float[Tensor, "*rows W"]:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits if temperature == 1.0 else logits / temperature


def check_arguments(hidden: Tensor, heads: Sequence[LinearHead], chunk_size: int, temperature: float) -> None:
    """Refuses what neither form of the statistics can use.

    Raises:
        ValueError: heads that are not one a depth, a chunk size below 1, a temperature that is not positive.
    """
    if len(heads) != len(hidden):
        raise ValueError(f"heads: expected one a depth, {len(hidden)}, got {len(heads)}; repeat a head that is shared")
    if chunk_size < 1:
        raise ValueError(f"chunk_size: expected at least 1 target row, got {chunk_size}")
    _check_temperature(temperature)


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(
            f"temperature: expected a positive number, got {temperature}; T = 0 is what top1 and hit measure"
        )
