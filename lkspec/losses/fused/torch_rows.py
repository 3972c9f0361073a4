"""What ``token_stats`` does with one chunk of rows: from products with a head to statistics, and back to slopes.

The numbers are those of ``divergences``, the definition; here they are made for speed on a CPU. Rows are taken in
blocks that fit the cache, one exponential a logit, and overlaps are summed as probabilities rather than in the log
domain. p is computed once for all depths, and q once for a row's statistics and slopes where one pass forms both. With
M_v = [q_v < p_v], m = sum_v q_v M_v and z the draft's logits over the temperature::

    d kl / dz = q - p~     d log_alpha / dz = q (M - m) / alpha     d reverse_kl / dz = q (log q - log p~ - reverse_kl)

Probabilities underflow where the draft and the target are disjoint. Rows of alpha below ``EXACT_BELOW`` (next to none:
logits that are 46 apart) therefore go through ``row_divergences`` and autograd.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lkspec.losses.divergences import RowValue, row_divergences, text_stats
from lkspec.losses.fused.logits import Logits, Scratch, blocks, softmax_into
from lkspec.losses.fused.target_rows import (
    TargetRows,
    read_target,
    read_target_columns,
    read_target_inside,
    read_target_pieces,
)
from lkspec.vocab import DraftVocab

__all__ = [
    "RowStats",
    "d_logits",
    "read_target",
    "read_target_columns",
    "read_target_inside",
    "read_target_pieces",
    "row_stats",
]

#: Above it a sum of probabilities in float32 loses nothing to underflow (1e-38 each, a vocabulary of them).
EXACT_BELOW = 1e-20


class RowStats(dict[str, Tensor]):
    """Statistics by name; ``probs_left`` says whether ``row_stats`` left q in the logits' place."""

    probs_left: bool = False


def row_stats(
    logits: Logits,
    target: TargetRows,
    tokens: Int[Tensor, " R"],
    vocab: DraftVocab,
    scratch: Scratch,
    row_value: RowValue | None = None,
    *,
    leave_probs: bool = False,
) -> RowStats:
    """The statistics as ``divergences.logit_stats`` defines them.

    Args:
        logits, target, tokens, vocab, scratch, row_value: of the rows.
        leave_probs: ``d_logits`` follows: leave q in the logits' place, where nothing else of them is needed.
    """
    assert target.top1 is not None
    names = ("kl", "reverse_kl", "log_alpha", "accept_prob", *(("row_value",) if row_value else ()))
    stats = RowStats({name: torch.empty_like(target.log_coverage) for name in names})
    of_probs_alone = logits.head.soft_cap is None and row_value is None and logits.product.dtype == scratch.dtype
    stats.probs_left = leave_probs and of_probs_alone
    proposed = torch.empty_like(target.top1)
    at_token = vocab.to_draft(tokens).clamp(min=0)[:, None]
    for block in blocks(logits.product):
        values, p = logits.values(block, scratch.dtype), target.probs(block, scratch)
        q, other = scratch("q", *values.shape), scratch("other", *values.shape)
        log_sum, proposed[block] = softmax_into(values, q)
        alpha = torch.minimum(q, p, out=other).sum(-1)
        log_ratio = torch.sub(values, target.log_renormed[block], out=other).sub_(log_sum[:, None])
        at_block = log_ratio.gather(1, at_token[block]).squeeze(1)
        stats["accept_prob"][block] = at_block - target.log_coverage[block]
        product = scratch("product", *values.shape) if stats.probs_left else q
        stats["reverse_kl"][block] = torch.mul(q, log_ratio, out=product).sum(-1)
        stats["kl"][block] = log_ratio.mul_(p).sum(-1) / -target.log_coverage[block].exp()
        stats["log_alpha"][block] = alpha.log()
        if row_value is not None:
            stats["row_value"][block] = row_value(target.logp(block), values - log_sum[:, None])
        if (far := alpha < EXACT_BELOW).any():
            rows = far.nonzero().squeeze(1)
            exact = _exact(values[rows], target, rows + block.start)
            for name, value in exact.items():
                stats[name][rows + block.start] = value
            q[rows] = values[rows]  # their slopes come from the logits
        if stats.probs_left:
            logits.product[block].copy_(q)
    log_accept = stats.pop("accept_prob")
    stats |= text_stats(log_accept, proposed, target.top1, tokens, vocab)
    stats["coverage"] = target.log_coverage.exp()
    return stats


def d_logits(
    logits: Logits,
    target: TargetRows,
    stats: dict[str, Float[Tensor, " R"]],
    slopes: dict[str, Float[Tensor, " R"]],
    scratch: Scratch,
    row_value: RowValue | None = None,
) -> None:
    """Overwrites the product with d loss / d product, from ``slopes``, d loss / d statistics.

    Of ``stats`` it reads log_alpha and reverse_kl, and where ``row_stats`` made them, what that left.
    """
    probs_left = isinstance(stats, RowStats) and stats.probs_left
    inexact = ~(stats["log_alpha"].exp() < EXACT_BELOW)  # NaN shall stay NaN
    alpha, coverage = (x.exp().where(inexact, 1.0) for x in (stats["log_alpha"], target.log_coverage))
    none = torch.zeros_like(alpha)
    d_kl, d_alpha = slopes.get("kl", none), slopes.get("log_alpha", none) / alpha
    for block in blocks(logits.product):
        p, values, exact_slopes = target.probs(block, scratch), None, None
        if probs_left:
            q = logits.product[block]
        else:
            values = logits.values(block, scratch.dtype)
            q = torch.softmax(values, -1, out=scratch("q", *values.shape))
        other = scratch("other", *q.shape)
        if not inexact[block].all():
            rows = (~inexact[block]).nonzero().squeeze(1)
            exact_slopes = _exact_slopes((q if values is None else values)[rows], target, rows + block.start, slopes)
        d_reverse = None
        if "reverse_kl" in slopes:  # q (log q - log p~ - reverse_kl), whatever q log q is where q is 0
            above = target.log_renormed[block] + stats["reverse_kl"][block, None]
            d_reverse = torch.xlogy(q, q).addcmul_(above, q, value=-1).mul_(slopes["reverse_kl"][block, None])
        if "log_alpha" in slopes:
            below = torch.lt(q, p, out=other).mul_(q)
            q.mul_((d_kl[block] - d_alpha[block] * below.sum(-1))[:, None]).addcmul_(below, d_alpha[block, None])
        else:
            q.mul_(d_kl[block, None])
        if "kl" in slopes:
            q.addcmul_(p, (d_kl / coverage)[block, None], value=-1)
        if d_reverse is not None:
            q.add_(d_reverse)
        if exact_slopes is not None:
            q[rows] = exact_slopes
        if "row_value" in slopes:
            assert row_value is not None
            assert values is not None
            q.add_(_row_value_slopes(values, target.logp(block), row_value, slopes["row_value"][block]))
        logits.overwrite(block, q, values)


def _exact(values: Float[Tensor, "r D"], target: TargetRows, rows: Int[Tensor, " r"]) -> dict[str, Float[Tensor, " r"]]:
    """The definition itself, of a few rows."""
    return row_divergences(values.log_softmax(-1), target.logp(rows), target.log_coverage[rows])


def _exact_slopes(
    values: Float[Tensor, "r D"], target: TargetRows, rows: Int[Tensor, " r"], slopes: dict[str, Float[Tensor, " R"]]
) -> Float[Tensor, "r D"]:
    with torch.enable_grad():
        leaf = values.detach().requires_grad_()
        stats = _exact(leaf, target, rows)
        exact = [stats[name] for name in stats if name in slopes]
    return torch.autograd.grad(exact, leaf, [slopes[name][rows] for name in stats if name in slopes])[0]


def _row_value_slopes(
    values: Float[Tensor, "r D"], logp: Float[Tensor, "r D"], row_value: RowValue, slope: Float[Tensor, " r"]
) -> Float[Tensor, "r D"]:
    with torch.enable_grad():
        leaf = values.detach().requires_grad_()
        return torch.autograd.grad(row_value(logp, leaf.log_softmax(-1)), leaf, slope)[0]
