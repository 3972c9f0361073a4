"""A key-value cache in which slot = position, for targets and drafts alike.

Rows of a batch accept different numbers of drafted tokens. Here each row writes at its own positions, and a query at
position i sees exactly the slots j <= i (i - window < j <= i in a sliding layer). A rejected token's entry is simply
overwritten when its position is written again, so there is no roll-back, no dead slot and no left padding.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_GROWTH = 128  # slots; a buffer that grows gets this many to spare, so that re-allocation is rare


class PositionCache:
    """Keys and values [B, N, L, head_dim] of each layer, written at explicit positions.

    Used by transformers models as ``past_key_values`` (it only calls ``update``) and by drafts directly.
    Call ``at(positions)`` before each forward pass.
    """

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self._positions: Tensor | None = None
        self._rows = torch.empty(0)
        self._limit = 0
        self.is_compileable = False

    def at(self, positions: Int[Tensor, "B S"]) -> None:
        """Sets the positions that the coming ``update`` calls write."""
        assert positions.shape[0] == self.num_rows, (positions.shape, self.num_rows)
        self._positions = positions
        self._rows = torch.arange(self.num_rows, device=positions.device)[:, None]
        self._limit = int(positions.max()) + 1

    @property
    def limit(self) -> int:
        """Slots that the coming forward pass can see: keys and masks have this length."""
        return self._limit

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Length as transformers asks for it; positions are always explicit, so it is never used to derive them."""
        return self._limit

    def update(
        self, keys: Float[Tensor, "B N S E"], values: Float[Tensor, "B N S E"], layer_idx: int, *_: object
    ) -> tuple[Float[Tensor, "B N L E"], Float[Tensor, "B N L E"]]:
        """Writes keys and values of one layer at the positions of ``at`` and returns all visible ones."""
        positions = self._positions
        assert positions is not None, "call at(positions) before update"
        while len(self.keys) <= layer_idx:
            self.keys.append(keys.new_zeros(0))
            self.values.append(values.new_zeros(0))
        for buffers, new in ((self.keys, keys), (self.values, values)):
            buffers[layer_idx] = _reserve(buffers[layer_idx], new, self.num_rows, self._limit)
            # Advanced indices around a slice put the indexed axes first: [B, S, N, E].
            buffers[layer_idx][self._rows, :, positions] = new.transpose(1, 2)
        return self.keys[layer_idx][:, :, : self._limit], self.values[layer_idx][:, :, : self._limit]

    def mask(self, window: int | None = None) -> Bool[Tensor, "B 1 S L"]:
        """Which slots each query of the coming forward pass sees."""
        assert self._positions is not None, "call at(positions) before mask"
        queries = self._positions[:, None, :, None]
        slots = torch.arange(self._limit, device=queries.device)
        visible = slots <= queries
        return visible if window is None else visible & (slots > queries - window)

    def copy_rows(self, rows: Int[Tensor, " R"], source: PositionCache, length: int) -> None:
        """Copies the first ``length`` slots of another cache, which has R rows, over these rows."""
        for mine, others in ((self.keys, source.keys), (self.values, source.values)):
            for layer, other in enumerate(others):
                if len(mine) <= layer:
                    mine.append(other.new_zeros(0))
                mine[layer] = _reserve(mine[layer], other, self.num_rows, length)
                mine[layer][:, :, :length].index_copy_(0, rows, other[:, :, :length])

    def keep(self, rows: list[int]) -> None:
        """Drops all rows but these, which take the slots 0, 1, .. in the order given."""
        moved = [(slot, row) for slot, row in enumerate(rows) if slot != row]
        # A row that comes from behind the last kept slot is not overwritten before it is read: only such rows are
        # copied then, and the rest of the buffer stays where it is.
        in_place = all(row >= len(rows) for _, row in moved)
        copied = moved if in_place else list(enumerate(rows))
        device = self.keys[0].device if self.keys else None
        slots, sources = torch.tensor(copied, dtype=torch.int64, device=device).reshape(-1, 2).unbind(1)
        for buffers in (self.keys, self.values):
            for layer, buffer in enumerate(buffers):
                if in_place:
                    buffers[layer] = buffer[: len(rows)].index_copy_(0, slots, buffer[sources])
                else:
                    buffers[layer] = buffer[sources]
        self.num_rows = len(rows)
        self._positions = None


def _reserve(buffer: Tensor, like: Tensor, num_rows: int, limit: int) -> Tensor:
    """The buffer with room for ``limit`` slots; contents kept."""
    if buffer.ndim == 4 and buffer.shape[2] >= limit:
        return buffer
    if buffer.ndim < 4:  # nothing to spare at first: a prompt is read in a cache of its own, which never grows
        return like.new_zeros(num_rows, like.shape[1], limit, like.shape[3])
    grown = like.new_zeros(num_rows, like.shape[1], limit + _GROWTH, like.shape[3])
    grown[:, :, : buffer.shape[2]] = buffer
    return grown
