"""Gradients of the draft's hidden states and heads, summed over chunks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lkspec.types import LinearHead


class HeadGradients:
    """Gradients of hidden states and of head parameters, the latter summed up in at least float32.

    Args:
        hidden: the draft's hidden states.
        heads: one a depth, as the caller gave them.
        parameters: the weights and biases among them, each once.
        needs_hidden, needs_parameters: which of these take a gradient.
    """

    def __init__(
        self,
        hidden: Float[Tensor, "K B T H"],
        heads: Sequence[LinearHead],
        parameters: Sequence[Tensor],
        needs_hidden: bool,
        needs_parameters: Sequence[bool],
    ) -> None:
        self._heads, self._parameters, self._shape = heads, parameters, hidden.shape
        self._hidden = hidden.new_zeros(hidden[..., 0].numel(), hidden.shape[-1]) if needs_hidden else None
        self._totals = {
            id(parameter): torch.zeros_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32))
            for parameter, needed in zip(parameters, needs_parameters, strict=True)
            if needed
        }

    def add(
        self,
        depths: slice,
        anchors: Int[Tensor, " GR"],
        hidden: Float[Tensor, "GR H"],
        weight: Float[Tensor, "D H"],
        d_products: Float[Tensor, "G R D"],
    ) -> None:
        """Adds what depths of one weight give at rows of a chunk.

        Args:
            depths: from 0.
            anchors: of each row at each of these depths; any, where d_products is zero.
            hidden, weight: the factors of the products, as they were multiplied.
            d_products: d loss / d product.
        """
        for head, d_product in zip(self._heads[depths], d_products, strict=True):
            if head.bias is not None and (total := self._totals.get(id(head.bias))) is not None:
                total += d_product.sum(0, dtype=total.dtype) / head.scale
        flat = d_products.flatten(0, 1)
        if self._hidden is not None:
            self._hidden.index_add_(0, anchors, (flat @ weight).to(self._hidden.dtype))
        if (total := self._totals.get(id(self._heads[depths.start].weight))) is not None:
            if total.dtype == flat.dtype:
                total.addmm_(flat.T, hidden)
            else:
                total += flat.T @ hidden

    def all(self, factor: Tensor | None = None) -> tuple[Tensor | None, tuple[Tensor | None, ...]]:
        """Those of the hidden states and of the parameters, times a factor; None where none was asked for."""

        def scaled(total: Tensor | None) -> Tensor | None:
            return total if total is None or factor is None else total * factor

        totals = [scaled(self._totals.get(id(parameter))) for parameter in self._parameters]
        hidden = scaled(self._hidden)
        return (
            None if hidden is None else hidden.view(self._shape),
            tuple(
                None if total is None else total.to(parameter.dtype)
                for total, parameter in zip(totals, self._parameters, strict=True)
            ),
        )
