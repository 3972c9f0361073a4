"""Logits of a chunk's rows, and what goes over them on a CPU: in blocks that fit the cache, one exponential a logit."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lkspec.types import LinearHead

_BLOCK_BYTES = 2**20  # a tensor of a block, of each thread: about an L2 cache
_PIECE = 128
_PIECE_BYTES, _PIECE_COLUMNS = 4 * 2**20, 1024  # of logits that are read piece by piece, in a cache


class Scratch:
    """Named tensors whose memory survives from one chunk to the next.

    A fresh tensor of tens of MiB costs the system's page faults each time, more than the arithmetic on it.

    Args:
        device: of all of them.
        dtype: of those that ask for no other.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self._kept: dict[str, Tensor] = {}

    def __call__(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor of this name, with whatever it holds; it is the caller's until the name is asked for again."""
        size, dtype = math.prod(shape), dtype or self.dtype
        if name not in self._kept or self._kept[name].numel() < size or self._kept[name].dtype != dtype:
            self._kept.pop(name, None)  # before its successor is there
            self._kept[name] = torch.empty(size, device=self.device, dtype=dtype)
        return self._kept[name][:size].view(shape)


class Logits(NamedTuple):
    """Logits of some rows, not yet scaled, biased, capped and tempered.

    Attributes:
        product: h W^T in the head's precision.
        head: says what follows.
        temperature: divides the logits; a tensor has one a row.
    """

    product: Float[Tensor, "R W"]
    head: LinearHead
    temperature: float | Float[Tensor, " R"]

    def values(self, block: slice, dtype: torch.dtype) -> Float[Tensor, "r W"]:
        """Of a block of rows, the logits over the temperature; a view of the product where nothing changes it."""
        values, head = self.product[block].to(dtype), self.head
        if head.scale != 1.0:
            values = values * head.scale
        if head.bias is not None:
            values = values + head.bias
        if head.soft_cap is not None:
            values = head.soft_cap * torch.tanh(values / head.soft_cap)
        temperature = self._divisor(block, dtype)
        return values / temperature if isinstance(temperature, Tensor) or temperature != 1.0 else values

    def overwrite(self, block: slice, slopes: Float[Tensor, "r W"], values: Float[Tensor, "r W"] | None) -> None:
        """Puts d loss / d product in the product's place, from d loss / d values; a soft cap asks for the values."""
        temperature = self._divisor(block, slopes.dtype)
        factor = self.head.scale / temperature
        if isinstance(factor, Tensor) or factor != 1.0:
            slopes.mul_(factor)
        if self.head.soft_cap is not None:
            assert values is not None
            slopes = slopes * (1 - (values * (temperature / self.head.soft_cap)) ** 2)
        if (place := self.product[block]).data_ptr() != slopes.data_ptr():
            place.copy_(slopes)

    def _divisor(self, block: slice, dtype: torch.dtype) -> float | Float[Tensor, "r 1"]:
        if isinstance(self.temperature, Tensor):
            return self.temperature[block, None].to(dtype)
        return self.temperature


def logit_pieces(
    hidden: Float[Tensor, "R H"], head: LinearHead, temperature: float | Float[Tensor, " R"], scratch: Scratch
) -> Iterator[tuple[slice, Logits]]:
    """Logits over slices of the vocabulary that fit a CPU's cache, in order, each valid until the next is asked for."""
    hidden, width = hidden.to(head.weight.dtype), len(head.weight)
    if hidden.device.type == "cpu":
        width = max(_PIECE_COLUMNS, _PIECE_BYTES // (4 * max(len(hidden), 1)))
    for begin in range(0, len(head.weight), width):
        columns = slice(begin, min(begin + width, len(head.weight)))
        bias = None if head.bias is None else head.bias[columns]
        piece = replace(head, weight=head.weight[columns], bias=bias)
        yield columns, Logits(multiply("target_product", hidden, piece, scratch), piece, temperature)


def multiply(name: str, hidden: Float[Tensor, "R H"], head: LinearHead, scratch: Scratch) -> Float[Tensor, "R W"]:
    """h W^T, into the scratch of this name."""
    product = scratch(name, len(hidden), len(head.weight), dtype=hidden.dtype)
    return torch.mm(hidden, head.weight.T, out=product)


def softmax_into(
    values: Float[Tensor, "r W"], out: Float[Tensor, "r W"]
) -> tuple[Float[Tensor, " r"], Int[Tensor, " r"]]:
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


def blocks(rows: Float[Tensor, "R W"]) -> Iterator[slice]:
    """Slices of rows that stay in cache from one operation to the next; on an accelerator all rows."""
    size = max(1, len(rows))
    if rows.device.type == "cpu":
        size = max(4, _BLOCK_BYTES * torch.get_num_threads() // (4 * rows.shape[1]))
    for begin in range(0, len(rows), size):
        yield slice(begin, min(begin + size, len(rows)))
