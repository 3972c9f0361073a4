"""Objectives on the expected number of accepted tokens: what alpha is for, the depths taken together."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lkspec.losses.objectives import LKLambda, Objective
from lkspec.types import TokenStats


class ExpectedLength(Objective):
    """-log sum_k prod_{j<=k} alpha_j: of the expected number of tokens accepted along the text from an anchor on.

    Its derivative in log alpha_j is -w_j with ``w_j = sum_{k>=j} prod_{i<=k} alpha_i / sum_k prod_{i<=k} alpha_i``, so
    depths weight themselves: the first has weight 1, a deeper one the share of the accepted tokens that lie behind it.
    gamma plays no part, as the whole value stands at depth 1. With a single depth this is ``lk_alpha``.
    """

    def values(self, stats: TokenStats, mean_alpha: Float[Tensor, " K"]) -> Float[Tensor, "K B T"]:
        anchors = stats.mask[0]
        log_reached = stats.log_alpha.cumsum(0).masked_fill(~stats.mask, -torch.inf)
        # Zeros where there is no anchor, before the logsumexp, whose gradient is NaN in a column of -inf.
        log_accepted = log_reached.masked_fill(~anchors, 0.0).logsumexp(0)
        at_first = -log_accepted.masked_fill(~anchors, 0.0)
        return torch.cat([at_first[None], torch.zeros_like(stats.log_alpha[1:])])

    def describe(self) -> str:
        return "expected_length"


class ExpectedLengthLambda(LKLambda):
    """``lk_lambda`` with the expected number of accepted tokens in the place of each depth's alpha.

    At depth k lambda_k KL(p~ || q), and once an anchor, at depth 1, ``sum_k (1 - lambda_k) (1 - prod_{j<=k} alpha_j)``,
    with lambda_k = exp(-eta * mean alpha_k): KL keeps the draft near the target while little is accepted, then the
    accepted tokens themselves are counted. They are what tau is made of, so that the depths weight themselves; gamma
    weights KL alone. With a single depth this is ``lk_lambda``.

    Args:
        eta: how fast lambda falls.

    Raises:
        ValueError: eta that is negative or not finite.
    """

    def __init__(self, eta: float = 10.0) -> None:
        super().__init__(eta)
        self.scope = "batch"

    def values(self, stats: TokenStats, mean_alpha: Float[Tensor, " K"]) -> Float[Tensor, "K B T"]:
        weight = self._depth_lambda(mean_alpha)[:, None, None]
        # Depths outside the text reach nothing whatever the draft does: they are constants, left out.
        missed = -torch.expm1(stats.log_alpha.cumsum(0)).masked_fill(~stats.mask, 0.0)
        values = weight * stats.kl
        at_first = values[0] + ((1 - weight) * missed).sum(0)
        return torch.cat([at_first[None], values[1:]])

    def describe(self) -> str:
        return f"expected_length_lambda(eta={self.eta:g})"
