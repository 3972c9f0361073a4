"""Working memory that a pass over chunks uses again and again."""

from __future__ import annotations

import math

import torch
from torch import Tensor


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
