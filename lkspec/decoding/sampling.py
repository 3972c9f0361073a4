"""Distributions at a temperature and filter, and samples from them with one random generator a row."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lkspec.types import check_sharpness


@dataclass(frozen=True)
class Sampling:
    """How the target's text is sampled.

    Attributes:
        temperature: 0 is greedy.
        top_k: keep the k most probable tokens (0 = all).
        top_p: keep the smallest set whose mass reaches p (1 = all).
        draft_filter: ``same`` applies top-k and top-p to q as well, ``none`` only the temperature (as vLLM does).
        sharpness: q^sharpness, renormalised, in place of q (1 = as trained); verification is lossless for any q.

    Raises:
        ValueError: values out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    draft_filter: str = "none"
    sharpness: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature: expected >= 0, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k: expected >= 0 (0 = all tokens), got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected in (0, 1], got {self.top_p}")
        if self.draft_filter not in ("none", "same"):
            raise ValueError(f"draft_filter: expected 'none' or 'same', got {self.draft_filter!r}")
        check_sharpness(self.sharpness)

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    def target_probs(self, logits: Float[Tensor, "... V"]) -> Float[Tensor, "... V"]:
        """p: one-hot at the argmax when greedy, else the filtered softmax, in float64."""
        return distribution(logits, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)

    def draft_probs(self, logits: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """q^sharpness, filtered when ``draft_filter`` is ``same``."""
        temperature = self.temperature / self.sharpness
        if self.draft_filter == "same":
            return distribution(logits, temperature=temperature, top_k=self.top_k, top_p=self.top_p)
        return distribution(logits, temperature=temperature)


def distribution(
    logits: Float[Tensor, "... V"], *, temperature: float, top_k: int = 0, top_p: float = 1.0
) -> Float[Tensor, "... V"]:
    """softmax(logits / temperature) after top-k, then top-p; temperature 0 is one-hot at the argmax.

    float64, so that cumulative sums over large vocabularies stay exact enough to invert.
    """
    if temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).double()
    scaled = logits.double() / temperature
    if 0 < top_k < scaled.shape[-1]:
        kept = scaled.topk(top_k, dim=-1)
        scaled = torch.full_like(scaled, -torch.inf).scatter_(-1, kept.indices, kept.values)
    probs = scaled.softmax(-1)
    if top_p < 1:
        ordered, order = probs.sort(dim=-1, descending=True, stable=True)
        # A token stays while the mass before it is short of top_p: the first one always does.
        dropped = ordered.cumsum(-1) - ordered >= top_p
        ordered = ordered.masked_fill(dropped, 0.0)
        probs = torch.zeros_like(probs).scatter_(-1, order, ordered)
        probs = probs / probs.sum(-1, keepdim=True)
    return probs


def invert_cdf(probs: Float[Tensor, "B V"], uniforms: Float[Tensor, " B"]) -> Int[Tensor, " B"]:
    """The token at which the cumulative sum of each row passes u * total; never one of probability zero."""
    cumulative = probs.cumsum(-1)
    total = cumulative[:, -1]
    # u * total can round up to the total itself; just below it lies the last token with mass.
    threshold = torch.minimum(uniforms.to(total) * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, threshold[:, None], right=True)[:, 0]


def row_generator(seed: int, prompt_id: str, turn: int) -> torch.Generator:
    """One generator a (seed, prompt, turn): results do not depend on how prompts are batched."""
    digest = hashlib.sha256(f"{seed}\x00{prompt_id}\x00{turn}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
