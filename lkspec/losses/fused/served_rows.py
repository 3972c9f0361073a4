"""Which target rows a mask of anchors needs: row r serves anchor r - k at every depth k."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


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
