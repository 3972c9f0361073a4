"""Top-k and top-p on the target's logits: the distribution that a filtered decoding accepts against."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class TargetFilter:
    """Keeps the most probable tokens of p: the top k, then of these the smallest set whose mass reaches top_p.

    Ties with the last token kept are kept too, so that the kept set is a threshold on the logits.

    Attributes:
        top_k: 0 keeps all.
        top_p: 1 keeps all.

    Raises:
        ValueError: top_k below 0, top_p outside (0, 1].
    """

    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.top_k < 0:
            raise ValueError(f"top_k: expected at least 0 (0 = all tokens), got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected in (0, 1], got {self.top_p}")

    @property
    def is_on(self) -> bool:
        return self.top_k > 0 or self.top_p < 1

    def __call__(self, logits: Float[Tensor, "*rows V"]) -> Float[Tensor, "*rows V"]:
        """Logits, over the temperature already, with -inf where a token is dropped."""
        if not self.is_on:
            return logits
        num_tokens = logits.shape[-1]
        ordered = logits.topk(min(self.top_k or num_tokens, num_tokens), dim=-1).values
        probs = ordered.double().softmax(-1)
        # A token stays while the mass before it is short of top_p: the first one always does.
        num_kept = (probs.cumsum(-1) - probs < self.top_p).sum(-1, keepdim=True).clamp(min=1)
        return logits.masked_fill(logits < ordered.gather(-1, num_kept - 1), -torch.inf)
