"""Chunks of target rows: which rows a mask needs, how many make a chunk, and their products with the heads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lkspec.losses.divergences import RowValue
from lkspec.losses.fused.head_gradients import HeadGradients
from lkspec.losses.fused.in_forward import InForward
from lkspec.losses.fused.logits import Logits, Scratch, logit_pieces, multiply
from lkspec.losses.target_filter import TargetFilter
from lkspec.types import HeadSummary, LinearHead
from lkspec.vocab import DraftVocab

_CPU_BYTES, _CPU_ROWS = 96 * 2**20, (256, 1024)
_GPU_PAIRS, _GPU_ROWS = 4096, (512, 4096)


def chunk_rows(vocab: DraftVocab, num_depths: int, device: torch.device, *, filtered: bool = False) -> int:
    """Target rows of a chunk. Products want many (each chunk reads a head, and its gradient twice), memory wants few.

    On a CPU, what 96 MiB of float32 hold, but at least 256 rows, below which products slow down, and at most 1,024,
    above which they gain nothing. A row holds the logits of one depth, log p~, p where several depths read it, and if a
    filter has to see them, the target's logits. On a GPU a product takes all depths that share a head, so rows are
    counted over depths: 4,096 of them, and at least 512 of the target's.
    """
    if not products_span_depths(device):
        width = (2 if num_depths == 1 else 3) * vocab.size
        if filtered and not vocab.is_full:
            width += vocab.target_size
        return min(max(_CPU_BYTES // (4 * width), _CPU_ROWS[0]), _CPU_ROWS[1])
    return min(max(-(-_GPU_PAIRS // num_depths), _GPU_ROWS[0]), _GPU_ROWS[1])


def products_span_depths(device: torch.device) -> bool:
    """Whether one product takes all depths that share a head; on a CPU the rows of one depth fill it well enough."""
    return device.type != "cpu"


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

    def to(self, device: torch.device) -> ServedRows:
        """The same on a device."""
        return ServedRows(*(tensor.to(device, non_blocking=True) for tensor in self))

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


@dataclass(frozen=True)
class Chunks:
    """What every chunk needs besides tensors that carry gradients.

    Attributes:
        learns: whether anything will ask for gradients.
        summary: of the target's logits at every slot [B, T]; None where p is read over the whole vocabulary.
        Others: as ``token_stats`` describes them.
    """

    heads: tuple[LinearHead, ...]
    target_head: LinearHead
    vocab: DraftVocab
    temperature: float | Float[Tensor, "B T"]
    target_filter: TargetFilter
    row_value: RowValue | None
    in_forward: InForward | None
    chunk_size: int
    served: ServedRows
    autocast_dtype: torch.dtype | None
    learns: bool
    summary: HeadSummary | None

    @cached_property
    def parameters(self) -> tuple[Tensor, ...]:
        """Weights and biases of the heads, a shared one once."""
        tensors = [tensor for head in self.heads for tensor in (head.weight, head.bias) if tensor is not None]
        return tuple({id(tensor): tensor for tensor in tensors}.values())

    @cached_property
    def dtype(self) -> torch.dtype:
        """Of everything between products: at least float32."""
        dtype = torch.float32
        for head in (*self.heads, self.target_head):
            dtype = torch.promote_types(dtype, self.autocast_dtype or head.weight.dtype)
        return dtype

    @property
    def num_chunks(self) -> int:
        """0 where no row is needed."""
        return -(-len(self.served.rows) // self.chunk_size)

    def slices(self) -> Iterator[slice]:
        """Slices of the target rows, of equal length but for the last."""
        num_rows = len(self.served.rows)
        length = -(-num_rows // max(self.num_chunks, 1))
        for begin in range(0, num_rows, max(length, 1)):
            yield slice(begin, min(begin + length, num_rows))

    def temperature_of(self, rows: slice) -> float | Float[Tensor, " r"]:
        """That of a chunk."""
        if isinstance(self.temperature, Tensor):
            return self.temperature.flatten()[self.served.rows[rows]]
        return self.temperature

    def summary_of(self, rows: slice) -> HeadSummary:
        """That of a chunk."""
        assert self.summary is not None
        slots = self.served.rows[rows]
        normaliser, argmax = self.summary.log_normaliser.flatten()[slots], self.summary.argmax.flatten()[slots]
        return HeadSummary(normaliser.to(self.dtype), argmax)

    def groups(self) -> Iterator[slice]:
        """Slices of the depths (from 0) whose rows share a product."""
        begin, alone = 0, not products_span_depths(self.served.rows.device)
        for end in range(1, len(self.heads) + 1):
            if alone or end == len(self.heads) or self.heads[end].weight is not self.heads[begin].weight:
                yield slice(begin, end)
                begin = end

    def cast(self, head: LinearHead) -> LinearHead:
        """A head as it multiplies."""
        return head if self.autocast_dtype is None else replace(head, weight=head.weight.to(self.autocast_dtype))


class ChunkPass:
    """One pass over the chunks, forward or backward.

    Args:
        chunks: of which rows, and with what.
        hidden: the draft's hidden states.
        target_hidden: the target's.
        columns: multiply with the target's head over the draft vocabulary alone.
    """

    def __init__(
        self,
        chunks: Chunks,
        hidden: Float[Tensor, "K B T H"],
        target_hidden: Float[Tensor, "B T Ht"],
        *,
        columns: bool,
    ) -> None:
        self._chunks = chunks
        self._flat_hidden, self._flat_target = hidden.flatten(0, 2), target_hidden.flatten(0, 1)
        # Under autocast a pass converts each weight once, not once a chunk.
        cast = {id(head.weight): chunks.cast(head).weight for head in chunks.heads}
        self._heads = [replace(head, weight=cast[id(head.weight)]) for head in chunks.heads]
        self._target_head = chunks.cast(_columns(chunks.target_head, chunks.vocab) if columns else chunks.target_head)
        self.scratch = Scratch(hidden.device, chunks.dtype)

    def target_logits(self, rows: slice) -> Logits:
        """The target's logits of a chunk."""
        hidden = self._flat_target[self._chunks.served.rows[rows]]
        product = multiply("target_product", hidden.to(self._target_head.weight.dtype), self._target_head, self.scratch)
        return Logits(product, self._target_head, self._chunks.temperature_of(rows))

    def target_pieces(self, rows: slice) -> Iterator[tuple[slice, Logits]]:
        """The same over slices of the vocabulary, each valid until the next is asked for."""
        hidden = self._flat_target[self._chunks.served.rows[rows]]
        return logit_pieces(hidden, self._target_head, self._chunks.temperature_of(rows), self.scratch)

    def draft_logits(self, rows: slice, gradients: HeadGradients | None) -> Iterator[tuple[int, Logits]]:
        """The draft's logits of a chunk at each depth (from 0), valid until the next is asked for.

        ``gradients`` takes up what was left in the place of the products.
        """
        served, temperature = self._chunks.served, self._chunks.temperature_of(rows)
        for depths in self._chunks.groups():
            head, needed = self._heads[depths.start], served.needed[depths, rows].flatten()
            anchors = served.anchors[depths, rows].flatten()
            # Zeros BEFORE any arithmetic, so that a NaN at a masked entry meets neither a value nor a gradient.
            hidden = self._flat_hidden[anchors].masked_fill(~needed[:, None], 0.0).to(head.weight.dtype)
            flat = multiply("draft_product", hidden, head, self.scratch)
            products = flat.view(-1, rows.stop - rows.start, len(head.weight))
            for depth, product in enumerate(products, start=depths.start):
                yield depth, Logits(product, self._heads[depth], temperature)
            if gradients is not None:
                gradients.add(depths, anchors, hidden, head.weight, products)


def _columns(head: LinearHead, vocab: DraftVocab) -> LinearHead:
    if vocab.is_full:
        return head
    bias = None if head.bias is None else head.bias[vocab.ids]
    return replace(head, weight=head.weight[vocab.ids], bias=bias)
