"""What ``fused_linear`` does with one chunk of rows: from products with a head to statistics, and back to slopes.

The numbers are those of ``divergences``, the definition; here they are made for speed on a CPU. Rows are taken in
blocks that fit the cache, one exponential a logit, and overlaps are summed as probabilities rather than in the log
domain. With M_v = [q_v < p_v], m = sum_v q_v M_v and z the draft's logits over the temperature::

    d kl / dz = q - p~     d log_alpha / dz = q (M - m) / alpha     d reverse_kl / dz = q (log q - log p~ - reverse_kl)

Probabilities underflow where the draft and the target are disjoint. Rows of alpha below ``EXACT_BELOW`` (next to none:
logits that are 46 apart) therefore go through ``row_divergences`` and autograd.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lkspec.losses.divergences import LOG_ZERO, RowValue, row_divergences, text_stats
from lkspec.losses.scratch import Scratch
from lkspec.losses.target_filter import TargetFilter
from lkspec.types import LinearHead
from lkspec.vocab import DraftVocab

#: Above it a sum of probabilities in float32 loses nothing to underflow (1e-38 each, a vocabulary of them).
EXACT_BELOW = 1e-20

_BLOCK_BYTES = 2**20  # a tensor of a block, of each thread: about an L2 cache
_PIECE = 128


class Logits(NamedTuple):
    """Logits of some rows, not yet scaled, biased, capped and tempered.

    Attributes:
        product: h W^T in the head's precision.
        head: says what follows.
        temperature: divides the logits.
    """

    product: Float[Tensor, "R W"]
    head: LinearHead
    temperature: float

    def values(self, block: slice, dtype: torch.dtype) -> Float[Tensor, "r W"]:
        """Of a block of rows, the logits over the temperature; a view of the product where nothing changes it."""
        values, head = self.product[block].to(dtype), self.head
        if head.scale != 1.0:
            values = values * head.scale
        if head.bias is not None:
            values = values + head.bias
        if head.soft_cap is not None:
            values = head.soft_cap * torch.tanh(values / head.soft_cap)
        return values if self.temperature == 1.0 else values / self.temperature

    def overwrite(self, block: slice, slopes: Float[Tensor, "r W"], values: Float[Tensor, "r W"]) -> None:
        """Puts d loss / d product in the product's place, from d loss / d values."""
        if (factor := self.head.scale / self.temperature) != 1.0:
            slopes = slopes * factor
        if self.head.soft_cap is not None:
            slopes = slopes * (1 - (values * (self.temperature / self.head.soft_cap)) ** 2)
        self.product[block].copy_(slopes)


class TargetRows(NamedTuple):
    """The target's side of rows, shared by all depths. It keeps logarithms alone: memory matters more than an exp.

    Attributes:
        log_renormed: log p~, at least LOG_ZERO.
        log_coverage: log of p's mass over the draft vocabulary; -inf where there is none.
        top1: target id of argmax p over the full vocabulary; None where only the draft vocabulary was read.
    """

    log_renormed: Float[Tensor, "R D"]
    log_coverage: Float[Tensor, " R"]
    top1: Int[Tensor, " R"] | None

    def probs(self, block: slice, scratch: Scratch) -> Float[Tensor, "r D"]:
        """p of a block."""
        log_renormed = self.log_renormed[block]
        probs = torch.softmax(log_renormed, -1, out=scratch("probs", *log_renormed.shape))
        return probs.mul_(self.log_coverage[block, None].exp())

    def logp(self, rows: slice | Tensor) -> Float[Tensor, "r D"]:
        """log p of some rows, -inf where p~ is 0."""
        inside = self.log_renormed[rows]
        if inside.amin() <= LOG_ZERO:
            inside = inside.masked_fill(inside <= LOG_ZERO, -torch.inf)
        return inside + self.log_coverage[rows, None]


def read_target(logits: Logits, vocab: DraftVocab, target_filter: TargetFilter, scratch: Scratch) -> TargetRows:
    """Statistics of p from logits over the target vocabulary, which a full draft vocabulary overwrites."""
    num_rows = len(logits.product)
    top1 = logits.product.new_empty(num_rows, dtype=torch.int64)
    log_coverage = logits.product.new_zeros(num_rows, dtype=scratch.dtype)
    log_renormed = _place_of_logs(logits, vocab.size, scratch)
    for block in _blocks(logits.product):
        values = target_filter(logits.values(block, scratch.dtype))
        if vocab.is_full:
            top1[block] = _renormalise(values, log_coverage[block], log_renormed[block], scratch)[1]
        else:
            normaliser, top1[block] = _softmax(values, scratch("whole", *values.shape))
            inside = vocab.restrict(values)
            log_coverage[block].masked_fill_(inside.amax(-1).isneginf(), -torch.inf)
            log_sum, _ = _renormalise(inside, log_coverage[block], log_renormed[block], scratch)
            log_coverage[block] += log_sum - normaliser
    return TargetRows(log_renormed, log_coverage, top1)


def read_target_columns(logits: Logits, log_coverage: Float[Tensor, " R"], scratch: Scratch) -> TargetRows:
    """The same, without top1, from logits over the draft vocabulary alone, which it overwrites."""
    log_renormed = _place_of_logs(logits, logits.product.shape[1], scratch)
    for block in _blocks(logits.product):
        _renormalise(logits.values(block, scratch.dtype), log_coverage[block], log_renormed[block], scratch)
    return TargetRows(log_renormed, log_coverage, top1=None)


def _place_of_logs(logits: Logits, width: int, scratch: Scratch) -> Float[Tensor, "R D"]:
    if logits.product.shape[1] == width and logits.product.dtype == scratch.dtype:
        return logits.product
    return scratch("log_renormed", len(logits.product), width)


def _renormalise(
    inside: Float[Tensor, "r D"], log_coverage: Float[Tensor, " r"], out: Float[Tensor, "r D"], scratch: Scratch
) -> tuple[Float[Tensor, " r"], Int[Tensor, " r"]]:
    """log p~ from logits over the draft vocabulary, of rows that have mass there; returns logsumexp and argmax."""
    lost = log_coverage.isneginf()
    if lost.any():
        inside = inside.masked_fill(lost[:, None], 0.0)
    log_sum, best = _softmax(inside, scratch("probs", *inside.shape))
    torch.sub(inside, log_sum[:, None], out=out).clamp_(min=LOG_ZERO)
    return log_sum, best


def row_stats(
    logits: Logits,
    target: TargetRows,
    tokens: Int[Tensor, " R"],
    vocab: DraftVocab,
    scratch: Scratch,
    row_value: RowValue | None = None,
) -> dict[str, Float[Tensor, " R"]]:
    """The statistics as ``divergences.logit_stats`` defines them; leaves the logits as they are."""
    assert target.top1 is not None
    names = ("kl", "reverse_kl", "log_alpha", "accept_prob", *(("row_value",) if row_value else ()))
    stats = {name: torch.empty_like(target.log_coverage) for name in names}
    proposed = torch.empty_like(target.top1)
    at_token = vocab.to_draft(tokens).clamp(min=0)[:, None]
    for block in _blocks(logits.product):
        values, p = logits.values(block, scratch.dtype), target.probs(block, scratch)
        q, other = scratch("q", *values.shape), scratch("other", *values.shape)
        log_sum, proposed[block] = _softmax(values, q)
        alpha = torch.minimum(q, p, out=other).sum(-1)
        log_ratio = torch.sub(values, target.log_renormed[block], out=other).sub_(log_sum[:, None])
        at_block = log_ratio.gather(1, at_token[block]).squeeze(1)
        stats["accept_prob"][block] = at_block - target.log_coverage[block]
        stats["reverse_kl"][block] = q.mul_(log_ratio).sum(-1)
        stats["kl"][block] = log_ratio.mul_(p).sum(-1) / -target.log_coverage[block].exp()
        stats["log_alpha"][block] = alpha.log()
        if row_value is not None:
            stats["row_value"][block] = row_value(target.logp(block), values - log_sum[:, None])
        if (far := alpha < EXACT_BELOW).any():
            rows = far.nonzero().squeeze(1)
            exact = _exact(values[rows], target, rows + block.start)
            for name, value in exact.items():
                stats[name][rows + block.start] = value
    log_accept = stats.pop("accept_prob")
    return {
        **stats,
        **text_stats(log_accept, proposed, target.top1, tokens, vocab),
        "coverage": target.log_coverage.exp(),
    }


def d_logits(
    logits: Logits,
    target: TargetRows,
    stats: dict[str, Float[Tensor, " R"]],
    slopes: dict[str, Float[Tensor, " R"]],
    scratch: Scratch,
    row_value: RowValue | None = None,
) -> None:
    """Overwrites the product with d loss / d product, from ``slopes``, d loss / d statistics.

    Of ``stats`` it reads log_alpha and reverse_kl.
    """
    inexact = ~(stats["log_alpha"].exp() < EXACT_BELOW)  # NaN shall stay NaN
    alpha, coverage = (x.exp().where(inexact, 1.0) for x in (stats["log_alpha"], target.log_coverage))
    none = torch.zeros_like(alpha)
    d_kl, d_alpha = slopes.get("kl", none), slopes.get("log_alpha", none) / alpha
    for block in _blocks(logits.product):
        values, p = logits.values(block, scratch.dtype), target.probs(block, scratch)
        q, other = scratch("q", *values.shape), scratch("other", *values.shape)
        d_reverse = None
        if "reverse_kl" in slopes:
            log_sum, _ = _softmax(values, q)
            d_reverse = values - target.log_renormed[block] - (log_sum + stats["reverse_kl"][block])[:, None]
            d_reverse = d_reverse.mul_(q).mul_(slopes["reverse_kl"][block, None])
        else:
            torch.softmax(values, -1, out=q)
        if "log_alpha" in slopes:
            below = torch.lt(q, p, out=other).mul_(q)
            q.mul_((d_kl[block] - d_alpha[block] * below.sum(-1))[:, None]).addcmul_(below, d_alpha[block, None])
        else:
            q.mul_(d_kl[block, None])
        if "kl" in slopes:
            q.addcmul_(p, (d_kl / coverage)[block, None], value=-1)
        if d_reverse is not None:
            q.add_(d_reverse)
        if not inexact[block].all():
            rows = (~inexact[block]).nonzero().squeeze(1)
            q[rows] = _exact_slopes(values[rows], target, rows + block.start, slopes)
        if "row_value" in slopes:
            assert row_value is not None
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


def _softmax(values: Float[Tensor, "r W"], out: Float[Tensor, "r W"]) -> tuple[Float[Tensor, " r"], Int[Tensor, " r"]]:
    """Softmax into ``out``; returns logsumexp and argmax, of the one exponential."""
    torch.softmax(values, -1, out=out)
    peak, best = _largest(values)
    return peak - out.gather(1, best[:, None]).squeeze(1).log(), best


def _largest(values: Float[Tensor, "r W"]) -> tuple[Float[Tensor, " r"], Int[Tensor, " r"]]:
    """Maximum and its first index: ``values.max(-1)``, which is not vectorised on a CPU, as a maximum of maxima."""
    width = values.shape[1]
    if width <= _PIECE or values.device.type != "cpu":
        peak, best = values.max(-1)
        return peak, best
    whole = width // _PIECE * _PIECE
    maxima = values[:, :whole].unflatten(1, (-1, _PIECE)).amax(-1)
    if whole < width:
        maxima = torch.cat([maxima, values[:, whole:].amax(-1, keepdim=True)], dim=1)
    piece = maxima.argmax(-1, keepdim=True) * _PIECE + torch.arange(_PIECE, device=values.device)
    piece.clamp_(max=width - 1)
    peak, inside = values.gather(1, piece).max(-1, keepdim=True)
    return peak.squeeze(1), piece.gather(1, inside).squeeze(1)


def _blocks(rows: Float[Tensor, "R W"]) -> Iterator[slice]:
    """Slices of rows that stay in cache from one operation to the next; on an accelerator all rows."""
    size = max(1, len(rows))
    if rows.device.type == "cpu":
        size = max(4, _BLOCK_BYTES * torch.get_num_threads() // (4 * rows.shape[1]))
    for begin in range(0, len(rows), size):
        yield slice(begin, min(begin + size, len(rows)))
