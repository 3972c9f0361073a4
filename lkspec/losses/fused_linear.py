"""``token_stats`` from hidden states without any [tokens, vocabulary] tensor that outlives its chunk.

The same statistics as ``divergences.token_stats``, the readable definition, as one ``torch.autograd.Function`` that
walks over chunks of target rows. Row r serves anchor r - k at every depth k, so the target's logits are computed once
for all K depths. Two ways to the gradient, the same numbers:

- *recompute*: forward keeps a few numbers of each row; backward computes a chunk's draft logits and the target's draft
  columns again, and forms d/dz from d loss / d kl, d reverse_kl and d log_alpha (``fused_rows``).
- *in forward*: where an objective's value is a function of the row alone and the weight of each depth is known, d/dz is
  formed while the logits are there, and backward only scales.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from lkspec.losses.divergences import RowValue, ServedRows, check_arguments, served_rows, token_stats
from lkspec.losses.fused_rows import (
    HeadLogits,
    TargetRows,
    TextRows,
    d_logits,
    head_logits,
    row_stats,
    target_rows,
)
from lkspec.types import LinearHead, TokenStats
from lkspec.vocab import DraftVocab

_CPU_ROWS, _GPU_ROWS = 256, 1024  # target rows of a chunk; depths follow one another, so memory does not grow with K
_STATS = ("kl", "reverse_kl", "log_alpha", "accept_prob", "top1", "hit", "coverage")
_DIFFERENTIABLE = ("kl", "reverse_kl", "log_alpha")


@dataclass(frozen=True)
class InForward:
    """An objective whose gradient is formed in the forward pass.

    Attributes:
        values: one value a row, a function of that row's statistics alone; it sees R rows of one depth as [1, 1, R].
        weights: what the loss multiplies each depth's sum of values by; gradients are right up to a common factor only
            with these weights.
    """

    values: Callable[[TokenStats], Float[Tensor, "1 1 R"]]
    weights: Float[Tensor, " K"]


def fused_token_stats(
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
    in_forward: InForward | None = None,
    chunk_size: int | None = None,
) -> TokenStats:
    """The statistics of ``token_stats`` at bounded memory; kl, reverse_kl and log_alpha carry gradients, once.

    Args:
        hidden, heads, target_hidden, target_head, vocab, tokens, mask, temperature: as in ``token_stats``.
        row_value: a form (b) objective; it walks over the same chunks by autograd with recomputation, slower.
        in_forward: forms this objective's gradient at once; its values are then ``TokenStats.row_value``, and the other
            statistics carry no gradient.
        chunk_size: target rows a chunk; None takes 256 on a CPU, 1,024 on a GPU.

    Raises:
        ValueError: as ``token_stats``; both row_value and in_forward.
    """
    if chunk_size is None:
        chunk_size = _CPU_ROWS if hidden.device.type == "cpu" else _GPU_ROWS
    check_arguments(hidden, heads, chunk_size, temperature)
    if row_value is not None:
        if in_forward is not None:
            raise ValueError("row_value and in_forward exclude each other: a form (b) objective has its own walk")
        return token_stats(
            hidden, heads, target_hidden, target_head, vocab, tokens, mask,
            temperature=temperature, row_value=row_value, chunk_size=chunk_size, recompute=torch.is_grad_enabled(),
        )  # fmt: skip
    walk = _Walk(
        heads=tuple(heads),
        target_head=target_head,
        vocab=vocab,
        temperature=temperature,
        chunk_size=chunk_size,
        served=served_rows(mask),
        autocast_dtype=_autocast_dtype(hidden),
        in_forward=in_forward,
    )
    rows = _FusedStats.apply(walk, hidden, target_hidden, tokens, *walk.parameters)
    return TokenStats(
        mask=mask, **{name: walk.served.place(value, mask) for name, value in zip(walk.names, rows, strict=True)}
    )


def _autocast_dtype(hidden: Tensor) -> torch.dtype | None:
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


@dataclass(frozen=True)
class _Walk:
    """What every chunk needs besides tensors that carry gradients."""

    heads: tuple[LinearHead, ...]
    target_head: LinearHead
    vocab: DraftVocab
    temperature: float
    chunk_size: int
    served: ServedRows
    autocast_dtype: torch.dtype | None
    in_forward: InForward | None

    @property
    def names(self) -> tuple[str, ...]:
        """The statistics in the order of the function's outputs."""
        return _STATS if self.in_forward is None else (*_STATS, "row_value")

    @property
    def differentiable(self) -> tuple[str, ...]:
        """Those that carry gradients."""
        return _DIFFERENTIABLE if self.in_forward is None else ("row_value",)

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """Weights and biases of the heads, a shared one once."""
        tensors = [tensor for head in self.heads for tensor in (head.weight, head.bias) if tensor is not None]
        return tuple({id(tensor): tensor for tensor in tensors}.values())

    def chunks(self) -> Iterator[slice]:
        """Slices of the target rows."""
        for begin in range(0, len(self.served.rows), self.chunk_size):
            yield slice(begin, begin + self.chunk_size)

    def draft_heads(self) -> list[LinearHead]:
        """The draft's heads as they multiply; under autocast a pass converts each weight once, not once a chunk."""
        weights = {id(head.weight): head.weight for head in self.heads}
        weights = {key: self._cast(weight) for key, weight in weights.items()}
        return [replace(head, weight=weights[id(head.weight)]) for head in self.heads]

    def whole_target_head(self) -> LinearHead:
        """The target's head as it multiplies."""
        return replace(self.target_head, weight=self._cast(self.target_head.weight))

    def target_head_columns(self) -> LinearHead:
        """The same over the draft vocabulary alone."""
        head, ids = self.target_head, self.vocab.ids
        if self.vocab.is_full:
            return self.whole_target_head()
        bias = None if head.bias is None else head.bias[ids]
        return replace(head, weight=self._cast(head.weight[ids]), bias=bias)

    def draft_logits(self, flat_hidden: Float[Tensor, "N H"], head: LinearHead, depth: int, rows: slice) -> HeadLogits:
        """Draft logits that meet these target rows at a depth (from 0); those of zeros where none does."""
        needed = self.served.needed[depth, rows]
        # Zeros BEFORE any arithmetic, so that a NaN at a masked entry meets neither a value nor a gradient.
        hidden = flat_hidden[self.served.anchors[depth, rows]].masked_fill(~needed[:, None], 0.0)
        return head_logits(head, hidden, self.temperature)

    def row_slopes(
        self, stats: dict[str, Float[Tensor, " R"]], depth: int, rows: slice
    ) -> tuple[Float[Tensor, " R"], dict[str, Float[Tensor, " R"]]]:
        """The in-forward objective's value of each row, and its slopes in the statistics times the depth's weight."""
        assert self.in_forward is not None
        with torch.enable_grad():
            leaves = {name: stats[name][None, None].clone().requires_grad_() for name in _DIFFERENTIABLE}
            rest = {name: stats[name][None, None] for name in _STATS if name not in leaves}
            everywhere = torch.ones_like(leaves["kl"], dtype=torch.bool)
            values = self.in_forward.values(TokenStats(mask=everywhere, **leaves, **rest))
            assert values.shape == everywhere.shape, "in_forward: the values of R rows must be [1, 1, R]"
            slopes = torch.autograd.grad(values.sum(), list(leaves.values()), allow_unused=True)
        weight = self.in_forward.weights[depth].to(values.dtype)
        unneeded = ~self.served.needed[depth, rows]
        return values.detach()[0, 0], {
            name: slope[0, 0].masked_fill(unneeded, 0.0) * weight
            for name, slope in zip(leaves, slopes, strict=True)
            if slope is not None
        }

    def _cast(self, weight: Tensor) -> Tensor:
        return weight if self.autocast_dtype is None else weight.to(self.autocast_dtype)


class _FusedStats(torch.autograd.Function):
    """The statistics of all target rows at all depths, [K, R] each."""

    @staticmethod
    def forward(
        ctx: Any,
        walk: _Walk,
        hidden: Float[Tensor, "K B T H"],
        target_hidden: Float[Tensor, "B T Ht"],
        tokens: Int[Tensor, "B T"],
        *parameters: Tensor,
    ) -> tuple[Float[Tensor, "K R"], ...]:
        flat_hidden, flat_target, flat_tokens = hidden.flatten(0, 2), target_hidden.flatten(0, 1), tokens.flatten()
        shape, dtype = (len(walk.heads), len(walk.served.rows)), torch.promote_types(hidden.dtype, torch.float32)
        results = {name: hidden.new_empty(shape, dtype=dtype) for name in walk.names}
        sums = [torch.empty_like(results["kl"][0]) for _ in range(2)]
        gradients = None if walk.in_forward is None else _Gradients(walk, hidden, ctx.needs_input_grad)
        with torch.autocast(hidden.device.type, enabled=False):  # the walk has chosen the precision
            heads, target_head = walk.draft_heads(), walk.whole_target_head()
            for rows in walk.chunks():
                at = walk.served.rows[rows]
                target, text, *parts = _read_target(walk, target_head, flat_target[at], flat_tokens[at + 1])
                for whole, part in zip(sums, parts, strict=True):
                    whole[rows] = part
                for depth, head in enumerate(heads):
                    logits = walk.draft_logits(flat_hidden, head, depth, rows)
                    logq = logits.values.log_softmax(-1)
                    stats = row_stats(logq, target, text, walk.vocab)
                    if gradients is not None:
                        stats["row_value"], slopes = walk.row_slopes(stats, depth, rows)
                        gradients.add(depth, rows, logits, d_logits(logq, target, stats, slopes))
                    for name in walk.names:
                        results[name][depth, rows] = stats[name]
        ctx.walk, ctx.gradients = walk, gradients
        ctx.set_materialize_grads(False)  # statistics that the loss does not use cost nothing in backward
        if gradients is None:
            ctx.save_for_backward(hidden, target_hidden, results["log_alpha"], results["reverse_kl"], *sums)
        ctx.mark_non_differentiable(*(results[name] for name in walk.names if name not in walk.differentiable))
        return tuple(results[name] for name in walk.names)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Float[Tensor, "K R"] | None) -> tuple[Tensor | None, ...]:
        walk: _Walk = ctx.walk
        by_name = {name: slope for name, slope in zip(walk.names, upstream, strict=True) if slope is not None}
        if ctx.gradients is not None:
            return None, *ctx.gradients.scaled(by_name["row_value"])
        hidden, target_hidden, log_alpha, reverse_kl, log_normaliser, log_coverage = ctx.saved_tensors
        flat_hidden, flat_target = hidden.flatten(0, 2), target_hidden.flatten(0, 1)
        gradients = _Gradients(walk, hidden, ctx.needs_input_grad)
        with torch.autocast(hidden.device.type, enabled=False):
            heads, columns = walk.draft_heads(), walk.target_head_columns()
            for rows in walk.chunks():
                logits = head_logits(columns, flat_target[walk.served.rows[rows]], walk.temperature)
                target = target_rows(logits.values - log_normaliser[rows, None], log_coverage[rows])
                for depth, head in enumerate(heads):
                    logits = walk.draft_logits(flat_hidden, head, depth, rows)
                    logq = logits.values.log_softmax(-1)
                    stats = {"log_alpha": log_alpha[depth, rows], "reverse_kl": reverse_kl[depth, rows]}
                    # Zero at rows that the depth does not need: ``place`` lets no gradient through to them.
                    slopes = {name: slope[depth, rows] for name, slope in by_name.items()}
                    gradients.add(depth, rows, logits, d_logits(logq, target, stats, slopes))
        return None, *gradients.all()


def _read_target(
    walk: _Walk, head: LinearHead, hidden: Float[Tensor, "R Ht"], tokens: Int[Tensor, " R"]
) -> tuple[TargetRows, TextRows, Float[Tensor, " R"], Float[Tensor, " R"]]:
    """The target's side of rows, and what backward needs of it: log sum_V exp z_p and log coverage."""
    logits = head_logits(head, hidden, walk.temperature).values
    log_normaliser = logits.logsumexp(-1)
    logp = walk.vocab.restrict(logits) - log_normaliser[:, None]
    log_coverage = logp.logsumexp(-1)
    text = TextRows(logits.argmax(-1), tokens, log_coverage.exp())
    return target_rows(logp, log_coverage), text, log_normaliser, log_coverage


class _Gradients:
    """Gradients of hidden states and head parameters, summed over chunks; parameters' in at least float32."""

    def __init__(self, walk: _Walk, hidden: Float[Tensor, "K B T H"], needs_grad: Sequence[bool]) -> None:
        self._walk, self._shape = walk, hidden.shape
        _, needs_hidden, _, _, *needs_parameter = needs_grad
        self._hidden = hidden.new_zeros(hidden[..., 0].numel(), hidden.shape[-1]) if needs_hidden else None
        self._parameters = {
            id(parameter): torch.zeros_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32))
            for parameter, needed in zip(walk.parameters, needs_parameter, strict=True)
            if needed
        }

    def add(self, depth: int, rows: slice, logits: HeadLogits, d_logits: Float[Tensor, "R D"]) -> None:
        """Adds one depth of a chunk; ``d_logits`` is zero at rows that the depth does not need."""
        head = self._walk.heads[depth]
        d_product = d_logits if isinstance(logits.slope, float) and logits.slope == 1.0 else d_logits * logits.slope
        if head.bias is not None and (total := self._parameters.get(id(head.bias))) is not None:
            total += d_product.sum(0) / head.scale
        d_product = d_product.to(logits.weight.dtype)
        if self._hidden is not None:
            # Each anchor has one row; the rows that the depth does not need all add zeros to anchor 0.
            d_hidden = (d_product @ logits.weight).to(self._hidden.dtype)
            self._hidden.index_add_(0, self._walk.served.anchors[depth, rows], d_hidden)
        if (total := self._parameters.get(id(head.weight))) is not None:
            if total.dtype == d_product.dtype:
                total.addmm_(d_product.T, logits.hidden)
            else:
                total += d_product.T @ logits.hidden

    def all(self) -> tuple[Tensor | None, ...]:
        """In the order of the function's inputs behind the walk."""
        totals = (self._parameters.get(id(parameter)) for parameter in self._walk.parameters)
        return (
            None if self._hidden is None else self._hidden.view(self._shape),
            None,
            None,
            *(
                None if total is None else total.to(parameter.dtype)
                for total, parameter in zip(totals, self._walk.parameters, strict=True)
            ),
        )

    def scaled(self, upstream: Float[Tensor, "K R"]) -> tuple[Tensor | None, ...]:
        """The same, of a loss whose slope in each value is a factor times the depth's weight."""
        assert self._walk.in_forward is not None
        weights = self._walk.in_forward.weights.to(upstream)[:, None]
        factors = (upstream / weights)[self._walk.served.needed]
        if factors.numel() == 0:
            return self.all()
        factor = factors[0]
        assert torch.allclose(factors, factor.expand_as(factors), rtol=1e-4), "in_forward: other weights than promised"
        return tuple(None if gradient is None else gradient * factor for gradient in self.all())
