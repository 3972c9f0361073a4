"""The draft vocabulary: which target tokens a draft can propose. The only place that knows about truncation."""

from __future__ import annotations

from typing import Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


def default_size(target_size: int) -> int:
    """The usual sizes: 32,000 of a vocabulary above 100,000, 8,192 of a smaller one, all of a tiny one."""
    return min(target_size, 32_000 if target_size > 100_000 else 8_192)


class DraftVocab(nn.Module):
    """An ordered subset of the target vocabulary.

    Attributes (buffers, saved with the draft):
        ids: target id of each draft id, ascending, [D].

    Raises:
        ValueError: ids that are empty, repeated, unsorted or outside the target vocabulary.
    """

    ids: Int[Tensor, " D"]
    draft_ids: Int[Tensor, " V"]

    def __init__(self, ids: Int[Tensor, " D"], target_size: int) -> None:
        super().__init__()
        ids = ids.to(torch.int64)
        if ids.ndim != 1 or ids.numel() == 0 or bool((ids.diff() <= 0).any()):
            raise ValueError("draft vocabulary: expected a non-empty, strictly ascending list of target token ids")
        if int(ids[0]) < 0 or int(ids[-1]) >= target_size:
            raise ValueError(f"draft vocabulary: ids must lie in [0, {target_size}), got {int(ids[0])}..{int(ids[-1])}")
        draft_ids = torch.full((target_size,), -1, dtype=torch.int64)
        draft_ids[ids] = torch.arange(ids.numel())
        self.register_buffer("ids", ids)
        self.register_buffer("draft_ids", draft_ids, persistent=False)

    @classmethod
    def full(cls, target_size: int) -> Self:
        """The whole target vocabulary."""
        return cls(torch.arange(target_size), target_size)

    @classmethod
    def from_counts(cls, counts: Int[Tensor, " V"], size: int, keep: tuple[int, ...] = ()) -> Self:
        """The ``size`` most frequent tokens; ``keep`` (special tokens) always among them, ties to the lower id.

        Raises:
            ValueError: a size that is not in [len(keep), V].
        """
        target_size = counts.numel()
        if not max(1, len(set(keep))) <= size <= target_size:
            raise ValueError(
                f"draft vocabulary: size must lie between the {len(set(keep))} tokens always kept and the target's "
                f"{target_size}, got {size}; set vocab.size"
            )
        ranked = counts.to(torch.int64).clone()
        if keep:
            ranked[list(keep)] = torch.iinfo(torch.int64).max
        order = torch.argsort(ranked, descending=True, stable=True)
        return cls(order[:size].sort().values, target_size)

    @property
    def size(self) -> int:
        """D."""
        return self.ids.numel()

    @property
    def target_size(self) -> int:
        """V."""
        return self.draft_ids.numel()

    @property
    def is_full(self) -> bool:
        """Whether every target token can be proposed."""
        return self.size == self.target_size

    @property
    def d2t(self) -> Int[Tensor, " D"]:
        """The engines' offset form: target id = draft id + d2t[draft id]."""
        return self.ids - torch.arange(self.size, device=self.ids.device)

    @property
    def t2d(self) -> Bool[Tensor, " V"]:
        """Membership of each target token."""
        return self.draft_ids >= 0

    def to_target(self, draft_ids: Int[Tensor, ...]) -> Int[Tensor, ...]:
        """Target ids of draft ids."""
        return draft_ids if self.is_full else self.ids[draft_ids]

    def to_draft(self, target_ids: Int[Tensor, ...]) -> Int[Tensor, ...]:
        """Draft ids of target ids; -1 outside the draft vocabulary."""
        return target_ids if self.is_full else self.draft_ids[target_ids]

    def restrict(self, values: Float[Tensor, "... V"]) -> Float[Tensor, "... D"]:
        """The columns of a target-vocabulary tensor that the draft can propose."""
        return values if self.is_full else values.index_select(-1, self.ids)

    def expand(self, probs: Float[Tensor, "... D"]) -> Float[Tensor, "... V"]:
        """Draft probabilities over the target vocabulary, zero outside."""
        if self.is_full:
            return probs
        wide = probs.new_zeros(*probs.shape[:-1], self.target_size)
        return wide.index_copy_(-1, self.ids, probs)

    def coverage(self, counts: Int[Tensor, " V"]) -> float:
        """Share of counted tokens that the draft can propose."""
        total = int(counts.sum())
        return int(counts[self.ids.to(counts.device)].sum()) / total if total else float("nan")
