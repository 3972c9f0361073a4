"""Attention over keys shared by a row and, besides, over keys of each query's own (training-time test).

``attend_dense`` is the definition: one softmax over all scores. ``attend`` gives the same without any tensor of
[queries, keys] where the mask is a ``CausalMask``. With the shared part's result o_0 and log-sum-exp l_0, and s_i, v_i
the score and value of own entry i, the whole is a merge of its parts::

    l = logsumexp(l_0, s_1, s_2, ..),   o = exp(l_0 - l) o_0 + sum_i exp(s_i - l) v_i

Flash attention's backward needs nothing of its forward but o and l, from which it forms the weights exp(score - l)
again. Given the MERGED o and l, it is therefore the exact backward of the shared part, and the own entries' is a few
products of [queries] by hand.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from lkspec.nn.flash import Flash, flash_kernel

_BLOCK = 256  # queries whose scores are alive together where no kernel applies

Own = tuple[tuple[Float[Tensor, "B M S E"], Float[Tensor, "B M S F"]], ...]


@dataclass(frozen=True)
class CausalMask:
    """Which shared keys each query sees, without a tensor of [S, S]: those of its document, not after its own slot.

    Attributes:
        documents: number of the document each slot belongs to; a document's slots follow one another.
        spans: first and last + 1 slot of each document, row by row; make a mask by ``of``, which finds them.
        window: how many positions a query sees; None for all.
        ahead: how many positions a query stands behind its own slot (depth - 1 of the training-time test).
        kernel: which kernel computes the attention: ``auto``, ``blocks`` or ``flash_attn``, see ``flash.check_kernel``.
    """

    documents: Int[Tensor, "B S"]
    spans: tuple[tuple[tuple[int, int], ...], ...]
    window: int | None = None
    ahead: int = 0
    kernel: str = "auto"

    @classmethod
    def of(
        cls,
        documents: Int[Tensor, "B S"],
        *,
        as_made: Int[Tensor, "B S"] | None = None,
        window: int | None = None,
        kernel: str = "auto",
    ) -> CausalMask:
        """The mask of packed documents (or of single ones, padded); ``as_made`` are they where reading is cheap."""
        spans = tuple(_spans(row) for row in (documents if as_made is None else as_made).tolist())
        return cls(documents, spans, window, 0, kernel)

    def pieces(self) -> Iterator[tuple[slice, slice]]:
        """Rows and slots that attend among themselves."""
        if len(set(self.spans)) == 1:
            yield from ((slice(None), slice(*span)) for span in self.spans[0])
            return
        for row, spans in enumerate(self.spans):
            yield from ((slice(row, row + 1), slice(*span)) for span in spans)

    def first_key(self, query: int) -> int:
        """The first key that any row's query at this slot, or a later one, sees."""
        begin = min(start for spans in self.spans for start, stop in spans if start <= query < stop)
        return begin if self.window is None else max(begin, query + self.ahead - self.window + 1)

    def dense(self, queries: slice = slice(None), keys: slice = slice(None)) -> Bool[Tensor, "B 1 s l"]:
        """The mask itself, of some queries and keys."""
        slots = torch.arange(self.documents.shape[1], device=self.documents.device)
        distance = slots[queries, None] - slots[keys]
        visible = (self.documents[:, queries, None] == self.documents[:, None, keys]) & (distance >= 0)
        if self.window is not None:
            visible = visible & (distance + self.ahead < self.window)
        return visible[:, None]


def _spans(documents: list[int]) -> tuple[tuple[int, int], ...]:
    spans, start = [], 0
    for _, slots in groupby(documents):
        stop = start + len(list(slots))
        spans.append((start, stop))
        start = stop
    return tuple(spans)


@dataclass
class Unrolled:
    """Keys and values of the training-time test, and the mask of the first depth's: one object in both roles.

    A transformers layer takes it as its cache and as its mask. As a cache it remembers nothing: what some layers keep
    there is not yet keys and values. The attention (``lkspec.targets.decoder_layer``) calls ``attend``.

    Attributes:
        entries: depth 1, which all anchors share, then each later depth, which only its own anchor sees.
    """

    mask: CausalMask
    entries: Own = ()

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: object) -> tuple[Tensor, Tensor]:
        """What it is given: this depth's alone."""
        return keys, values

    @torch.compiler.disable  # a compiler would specialise on the number of entries and on every packing
    def attend(
        self,
        queries: Float[Tensor, "B N S E"],
        keys: Float[Tensor, "B M S E"],
        values: Float[Tensor, "B M S F"],
        **options: Any,
    ) -> Float[Tensor, "B N S F"]:
        """``attend`` of one more depth's queries to all entries, its own included."""
        self.entries = (*self.entries, (keys, values))
        return attend(queries, *self.entries[0], self.mask, self.entries[1:], **options)


def attend(
    queries: Float[Tensor, "B N S E"],
    keys: Float[Tensor, "B M L E"],
    values: Float[Tensor, "B M L F"],
    mask: Bool[Tensor, "B 1 S L"] | CausalMask,
    own: Own = (),
    *,
    scaling: float | None = None,
    soft_cap: float | None = None,
    sinks: Float[Tensor, " N"] | None = None,
) -> Float[Tensor, "B N S F"]:
    """``attend_dense``, which says what the arguments are, by the cheapest way that there is.

    With a ``CausalMask`` memory is linear in S, forward and backward: by a flash kernel for plain causal attention
    (sinks included), otherwise query block by query block, recomputed in backward.
    """
    if isinstance(mask, CausalMask):
        flash = flash_kernel(mask.kernel, queries, keys, values)
        if flash is not None and soft_cap is None and mask.window is None:
            scaling = queries.shape[-1] ** -0.5 if scaling is None else scaling
            entries = tuple(tensor for entry in own for tensor in entry)
            return _Merged.apply(flash, mask, scaling, queries, keys, values, sinks, *entries)
        return _by_blocks(queries, keys, values, mask, own, scaling=scaling, soft_cap=soft_cap, sinks=sinks)
    if own or soft_cap is not None or sinks is not None:
        return attend_dense(queries, keys, values, mask, own, scaling=scaling, soft_cap=soft_cap, sinks=sinks)
    return torch.nn.functional.scaled_dot_product_attention(
        queries, keys, values, mask, scale=scaling, enable_gqa=queries.shape[1] != keys.shape[1]
    )


def attend_dense(
    queries: Float[Tensor, "B N S E"],
    keys: Float[Tensor, "B M L E"],
    values: Float[Tensor, "B M L F"],
    mask: Bool[Tensor, "B 1 S L"],
    own: Own = (),
    *,
    scaling: float | None = None,
    soft_cap: float | None = None,
    sinks: Float[Tensor, " N"] | None = None,
) -> Float[Tensor, "B N S F"]:
    """Grouped-query attention to masked keys and, besides, of each query to one key of its own per entry of ``own``.

    softmax over scaling * [q K^T | q k_own_1 | ...]: the entries of ``own`` are a diagonal (slot s of a query only
    meets slot s of an own key), so a depth of the training-time test costs S, not S^2, more scores.

    Args:
        scaling: 1 / sqrt(E) unless given.
        soft_cap: scores become soft_cap * tanh(scores / soft_cap).
        sinks: one more score a head, which takes its share of the softmax and has no value.
    """
    num_rows, num_heads, num_queries, head_dim = queries.shape
    grouped = _grouped(queries, keys)
    shared = grouped @ keys[:, :, None].transpose(-1, -2)
    precise = torch.promote_types(shared.dtype, torch.float32)
    diagonal = [(grouped * key[:, :, None]).sum(-1, keepdim=True).to(precise) for key, _ in own]
    scores = torch.cat([shared.to(precise), *diagonal], dim=-1) * (head_dim**-0.5 if scaling is None else scaling)
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    num_keys = keys.shape[2]
    visible = torch.nn.functional.pad(mask[:, :, None], (0, len(own)), value=True)
    scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        sink = sinks.to(precise).view(1, keys.shape[1], -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sink], dim=-1)
    weights = torch.softmax(scores, dim=-1).to(values.dtype)
    mixed = weights[..., :num_keys] @ values[:, :, None]
    for index, (_, value) in enumerate(own):
        mixed = mixed + weights[..., num_keys + index, None] * value[:, :, None]
    return mixed.reshape(num_rows, num_heads, num_queries, values.shape[-1])


def _grouped(heads: Float[Tensor, "B N S E"], keys: Float[Tensor, "B M L E"]) -> Float[Tensor, "B M G S E"]:
    """Heads beside those that read the same keys."""
    return heads.unflatten(1, (keys.shape[1], -1))


def _by_blocks(
    queries: Tensor, keys: Tensor, values: Tensor, mask: CausalMask, own: Own, **options: Any
) -> Float[Tensor, "B N S F"]:
    """``attend_dense`` of a block of queries after the other; backward computes each block again."""
    parts = []
    for start in range(0, queries.shape[2], _BLOCK):
        rows = slice(start, min(start + _BLOCK, queries.shape[2]))
        seen = slice(mask.first_key(start), rows.stop)
        here = tuple((key[:, :, rows], value[:, :, rows]) for key, value in own)
        block = (queries[:, :, rows], keys[:, :, seen], values[:, :, seen], mask.dense(rows, seen), here)
        parts.append(checkpoint(attend_dense, *block, use_reentrant=False, preserve_rng_state=False, **options))
    return torch.cat(parts, dim=2)


class _Merged(torch.autograd.Function):
    """The merge of the module's docstring, for causal attention within documents."""

    @staticmethod
    def forward(
        ctx: Any,
        flash: Flash,
        mask: CausalMask,
        scaling: float,
        queries: Float[Tensor, "B N S E"],
        keys: Float[Tensor, "B M S E"],
        values: Float[Tensor, "B M S E"],
        sinks: Float[Tensor, " N"] | None,
        *own: Float[Tensor, "B M S E"],
    ) -> Float[Tensor, "B N S E"]:
        mixed, log_sum = _shared_forward(flash, mask, scaling, queries, keys, values)
        grouped = _grouped(queries, keys)
        scores = [_dot(grouped, key[:, :, None]).mul_(scaling).flatten(1, 2) for key in own[::2]]
        if sinks is not None:
            scores.append(sinks.to(log_sum.dtype)[:, None].expand_as(log_sum))
        if scores:
            total = torch.stack([log_sum, *scores]).logsumexp(0)
            mixed = mixed * torch.exp(log_sum - total)[..., None].to(mixed.dtype)
            log_sum = total
            grouped = _grouped(mixed, keys)
            for score, value in zip(scores, own[1::2], strict=False):
                weight = _grouped(torch.exp(score - total)[..., None].to(value.dtype), keys)
                grouped.addcmul_(weight, value[:, :, None])
        ctx.flash, ctx.mask, ctx.scaling = flash, mask, scaling
        ctx.save_for_backward(queries, keys, values, sinks, mixed, log_sum, *own)
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Float[Tensor, "B N S E"]) -> tuple[Tensor | None, ...]:
        queries, keys, values, sinks, mixed, log_sum, *own = ctx.saved_tensors
        parts = (gradient, queries, keys, values, mixed, log_sum)
        d_queries, d_keys, d_values = _shared_backward(ctx.flash, ctx.mask, ctx.scaling, *parts)
        grouped, d_mixed, d_grouped = (_grouped(heads, keys) for heads in (queries, gradient, d_queries))
        common = _dot(gradient, mixed)  # what a softmax takes off the slope of every score
        d_own: list[Tensor] = []
        for key, value in zip(own[::2], own[1::2], strict=True):
            key, value = key[:, :, None], value[:, :, None]
            weight = torch.exp(_dot(grouped, key).mul_(ctx.scaling) - _grouped(log_sum, keys))
            slope = weight * (_dot(d_mixed, value) - _grouped(common, keys)) * ctx.scaling
            weight, slope = weight[..., None].to(value.dtype), slope[..., None].to(key.dtype)
            d_grouped.addcmul_(slope, key)
            d_own += [(slope * grouped).sum(2), (weight * d_mixed).sum(2)]
        d_sinks = None
        if sinks is not None:
            d_sinks = -(torch.exp(sinks.to(log_sum.dtype)[:, None] - log_sum) * common).sum((0, 2)).to(sinks.dtype)
        return None, None, None, d_queries, d_keys, d_values, d_sinks, *d_own


def _shared_forward(
    flash: Flash, mask: CausalMask, scaling: float, queries: Tensor, keys: Tensor, values: Tensor
) -> tuple[Float[Tensor, "B N S E"], Float[Tensor, "B N S"]]:
    """Causal attention within each document, and its log-sum-exp."""
    pieces = list(mask.pieces())
    if len(pieces) == 1:
        return flash.forward(queries, keys, values, scaling)
    mixed = torch.empty_like(queries)
    log_sum = queries.new_empty(queries.shape[:-1], dtype=torch.promote_types(queries.dtype, torch.float32))
    for rows, slots in pieces:
        part = (tensor[rows, :, slots] for tensor in (queries, keys, values))
        mixed[rows, :, slots], log_sum[rows, :, slots] = flash.forward(*part, scaling)
    return mixed, log_sum


def _shared_backward(
    flash: Flash, mask: CausalMask, scaling: float, *parts: Tensor
) -> tuple[Float[Tensor, "B N S E"], Float[Tensor, "B M S E"], Float[Tensor, "B M S E"]]:
    """Gradients of queries, keys and values; ``parts`` are what ``Flash.backward`` takes."""
    pieces = list(mask.pieces())
    if len(pieces) == 1:
        return flash.backward(*parts, scaling)
    _, queries, keys, values, *_ = parts
    gradients = (torch.empty_like(queries), torch.empty_like(keys), torch.empty_like(values))
    for rows, slots in pieces:
        found = flash.backward(*(tensor[rows, :, slots] for tensor in parts), scaling)
        for whole, piece in zip(gradients, found, strict=True):
            whole[rows, :, slots] = piece
    return gradients


def _dot(first: Tensor, second: Tensor) -> Tensor:
    """Products along the last axis, summed in at least float32."""
    return (first * second).sum(-1, dtype=torch.promote_types(first.dtype, torch.float32))
