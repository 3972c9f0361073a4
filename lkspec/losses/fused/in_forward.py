"""Objectives whose gradient is formed in the forward pass, from logits that are still in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Bool, Float, Real
from torch import Tensor

from lkspec.losses.objectives import Objective, depth_weights
from lkspec.types import TokenStats

DIFFERENTIABLE = ("kl", "reverse_kl", "log_alpha", "row_value")


@dataclass(frozen=True)
class InForward:
    """An objective whose gradient is formed in the forward pass.

    Attributes:
        values: one value a row, a function of that row's statistics and of mean_alpha at its depth; it sees R rows of
            one depth as [1, 1, R], and mean_alpha as [1].
        weights: what the loss multiplies each depth's sum of values by; gradients are right up to a common factor only
            with these weights.
        reads_mean_alpha: which is known in time only where one chunk holds all rows; where this is False,
            mean_alpha is NaN.
    """

    values: Callable[[TokenStats, Float[Tensor, " 1"]], Float[Tensor, "1 1 R"]]
    weights: Float[Tensor, " K"]
    reads_mean_alpha: bool = False

    @classmethod
    def of(cls, objective: Objective, counts: Real[Tensor, " K"], gamma: float = 0.8) -> Self | None:
        """For the loss of ``reduce_loss``; None where a value depends on more than its own depth."""
        if objective.scope == "batch":
            return None
        weights = depth_weights(len(counts), gamma).to(counts.device, non_blocking=True) / counts.clamp(min=1)
        return cls(objective.values, weights, reads_mean_alpha=objective.scope == "depth")

    def slopes(
        self, stats: dict[str, Float[Tensor, " R"]], depth: int, needed: Bool[Tensor, " R"]
    ) -> tuple[Float[Tensor, " R"], dict[str, Float[Tensor, " R"]]]:
        """Values of the rows of a depth (from 0), and their slopes in the statistics times the depth's weight."""
        with torch.enable_grad():
            rows = {name: value[None, None] for name, value in stats.items()}
            leaves = {name: rows[name].clone().requires_grad_() for name in DIFFERENTIABLE if name in rows}
            everywhere = torch.ones_like(leaves["kl"], dtype=torch.bool)
            values = self.values(TokenStats(mask=everywhere, **{**rows, **leaves}), self._mean_alpha(stats, needed))
            assert values.shape == everywhere.shape, "in_forward: the values of R rows must be [1, 1, R]"
            slopes = torch.autograd.grad(values.sum(), list(leaves.values()), allow_unused=True)
        weight = self.weights[depth].to(values.dtype)
        return values.detach()[0, 0], {
            name: slope[0, 0].masked_fill(~needed, 0.0) * weight
            for name, slope in zip(leaves, slopes, strict=True)
            if slope is not None
        }

    def _mean_alpha(self, stats: dict[str, Float[Tensor, " R"]], needed: Bool[Tensor, " R"]) -> Float[Tensor, " 1"]:
        if not self.reads_mean_alpha:
            return torch.full_like(stats["log_alpha"][:1], torch.nan)
        alpha = stats["log_alpha"].exp().masked_fill(~needed, 0.0)
        return (alpha.sum() / needed.sum().clamp(min=1))[None]

    def factor(self, upstream: Float[Tensor, "K R"], needed: Bool[Tensor, "K R"]) -> Tensor:
        """What a loss multiplies the promised one by, from its slope in each value."""
        if needed.numel() == 0:
            return upstream.new_ones(())
        factors, needed = (upstream / self.weights.to(upstream)[:, None]).flatten(), needed.flatten()
        first = needed.int().argmax()[None]  # an index by the mask itself would wait for the device
        factor = torch.where(needed[first], factors[first], 1.0)
        agree = torch.isclose(factors, factor, rtol=1e-4) | ~needed
        assert agree.all(), "in_forward: other weights than promised"
        return factor[0]
