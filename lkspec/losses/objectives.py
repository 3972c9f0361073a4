"""Objectives: a few lines each over per-token statistics, and the weighted sum over depths that all of them share.

An objective knows nothing of batches, ranks or vocabularies. It maps ``TokenStats`` to one value a token, zero where
the mask is 0 (form a), or gives a function of (logp, logq) that runs over the same chunks (form b).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Real
from torch import Tensor

from lkspec.losses.divergences import LOG_ZERO, RowValue
from lkspec.types import TokenStats


class Comparison(NamedTuple):
    """How p and q are formed before training compares them: the options of ``token_stats``."""

    temperature: float | Float[Tensor, "B T"] = 1.0
    top_k: int = 0
    top_p: float = 1.0


class Objective(ABC):
    """What training minimises, per supervised token. A new one is a subclass and a yaml file naming it.

    Attributes:
        scope: what a token's value depends on: ``row``, its own statistics at its own depth; ``depth``, mean_alpha of
            that depth as well; ``batch``, anything, such as other depths. Of a row, gradients are formed in the forward
            pass, of a depth where one chunk holds it whole.
    """

    scope: Literal["row", "depth", "batch"] = "batch"

    @property
    def row_value(self) -> RowValue | None:
        """For form (b), the function to give to ``token_stats``; None for form (a)."""
        return None

    def comparison(self, shape: tuple[int, ...]) -> Comparison:
        """The p and q of a training micro-batch of [B, T] tokens, asked once for each; validation takes plain ones."""
        return Comparison()

    @abstractmethod
    def values(self, stats: TokenStats, mean_alpha: Float[Tensor, " K"]) -> Float[Tensor, "K B T"]:
        """One value a token, zero where the mask is 0.

        ``mean_alpha`` is the masked mean of alpha at each depth, over all ranks of the current micro-batch, detached.
        """

    def scalars(self, mean_alpha: Float[Tensor, " K"]) -> dict[str, Float[Tensor, " K"]]:
        """Extra numbers a depth, for logging."""
        return {}

    @abstractmethod
    def describe(self) -> str:
        """Name and settings, as a banner shows them."""

    def __repr__(self) -> str:
        return self.describe()


class KL(Objective):
    """KL(p~ || q), the baseline; p~ is p renormalised over the draft vocabulary."""

    scope = "row"

    def values(self, stats: TokenStats, mean_alpha: Float[Tensor, " K"]) -> Float[Tensor, "K B T"]:
        return stats.kl

    def describe(self) -> str:
        return "kl"


class ReverseKL(Objective):
    """KL(q || p~)."""

    scope = "row"

    def values(self, stats: TokenStats, mean_alpha: Float[Tensor, " K"]) -> Float[Tensor, "K B T"]:
        return stats.reverse_kl

    def describe(self) -> str:
        return "reverse_kl"


class TV(Objective):
    """1 - alpha: the probability that a proposed token is rejected."""

    scope = "row"

    def values(self, stats: TokenStats, mean_alpha: Float[Tensor, " K"]) -> Float[Tensor, "K B T"]:
        return -torch.expm1(stats.log_alpha)

    def describe(self) -> str:
        return "tv"


class LKAlpha(Objective):
    """-log alpha, the log taken of each token's own alpha."""

    scope = "row"

    def values(self, stats: TokenStats, mean_alpha: Float[Tensor, " K"]) -> Float[Tensor, "K B T"]:
        return -stats.log_alpha

    def describe(self) -> str:
        return "lk_alpha"


class LKLambda(Objective):
    """lambda_k KL(p~ || q) + (1 - lambda_k) (1 - alpha), with lambda_k = exp(-eta * mean alpha_k) at depth k.

    Early, while alpha is low, this is KL; as alpha grows it turns into TV.

    Args:
        eta: how fast lambda falls; the paper takes 3, and 10 for MEDUSA.
        fixed_lambda: a constant lambda instead; eta is unused then.
        per_token: lambda = exp(-eta * alpha) with each token's own detached alpha, as two other code bases have it.

    Raises:
        ValueError: eta that is negative or not finite, fixed_lambda outside [0, 1], or fixed_lambda with per_token.
    """

    def __init__(self, eta: float = 3.0, *, fixed_lambda: float | None = None, per_token: bool = False) -> None:
        if not (eta >= 0 and math.isfinite(eta)):
            raise ValueError(f"lk_lambda: eta must be finite and at least 0, got {eta}")
        if fixed_lambda is not None and not 0 <= fixed_lambda <= 1:
            raise ValueError(f"lk_lambda: fixed_lambda must lie in [0, 1], got {fixed_lambda}")
        if fixed_lambda is not None and per_token:
            raise ValueError(
                f"lk_lambda: fixed_lambda={fixed_lambda} and per_token=True exclude each other; give one of them"
            )
        self.eta = eta
        self.fixed_lambda = fixed_lambda
        self.per_token = per_token
        self.scope = "row" if per_token or fixed_lambda is not None else "depth"

    def values(self, stats: TokenStats, mean_alpha: Float[Tensor, " K"]) -> Float[Tensor, "K B T"]:
        if self.per_token:
            weight = torch.exp(-self.eta * stats.log_alpha.detach().exp())
        else:
            weight = self._depth_lambda(mean_alpha)[:, None, None]
        return weight * stats.kl - (1 - weight) * torch.expm1(stats.log_alpha)

    def scalars(self, mean_alpha: Float[Tensor, " K"]) -> dict[str, Float[Tensor, " K"]]:
        """``lambda`` at each depth; nothing when lambda belongs to each token."""
        return {} if self.per_token else {"lambda": self._depth_lambda(mean_alpha)}

    def describe(self) -> str:
        if self.fixed_lambda is not None:
            return f"lk_lambda(lambda={self.fixed_lambda:g}, fixed)"
        return f"lk_lambda(eta={self.eta:g}, {'per token' if self.per_token else 'adaptive'})"

    def _depth_lambda(self, mean_alpha: Float[Tensor, " K"]) -> Float[Tensor, " K"]:
        if self.fixed_lambda is not None:
            return torch.full_like(mean_alpha, self.fixed_lambda)
        return torch.exp(-self.eta * mean_alpha)


class JensenShannon(Objective):
    """Jensen-Shannon divergence of p~ and q, in nats: the example of form (b)."""

    scope = "row"

    @property
    def row_value(self) -> RowValue:
        return jensen_shannon

    def values(self, stats: TokenStats, mean_alpha: Float[Tensor, " K"]) -> Float[Tensor, "K B T"]:
        assert stats.row_value is not None, "token_stats was not given this objective's row_value"
        return stats.row_value

    def describe(self) -> str:
        return "jsd"


def jensen_shannon(logp: Float[Tensor, "*rows D"], logq: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows"]:
    """(KL(p~ || m) + KL(q || m)) / 2 with m = (p~ + q) / 2, for log p with any denominator."""
    # Below LOG_ZERO p is 0 in floating point, so the floor changes no value; it keeps 0 * -inf away.
    log_renormed = logp.clamp(min=LOG_ZERO).log_softmax(-1)
    log_middle = torch.logaddexp(log_renormed, logq) - math.log(2)
    forward = log_renormed.exp() * (log_renormed - log_middle)
    backward = logq.exp() * (logq - log_middle)
    return 0.5 * (forward + backward).sum(-1)


def depth_weights(num_depths: int, gamma: float = 0.8) -> Float[Tensor, " K"]:
    """gamma^(k-1) for k = 1..K, in float64.

    Raises:
        ValueError: gamma that is not positive.
    """
    if not gamma > 0:
        raise ValueError(f"gamma: expected a positive weight ratio between depths, got {gamma}")
    return torch.tensor([gamma**exponent for exponent in range(num_depths)], dtype=torch.float64)


def reduce_loss(
    values: Float[Tensor, "K B T"], mask: Bool[Tensor, "K B T"], counts: Real[Tensor, " K"], gamma: float = 0.8
) -> Float[Tensor, ""]:
    """The loss: ``sum_k gamma^(k-1) * sum(values_k * mask_k) / counts_k``.

    The sum is NOT divided by the sum of the weights, for every objective alike.

    ``counts[k-1]`` is N_k, the number of supervised tokens of the whole optimiser step over all ranks and
    micro-batches, so that plain sums of this loss (and of its gradient) over ranks and micro-batches are the mean over
    the step's tokens. A depth whose count is 0 contributes 0.

    Raises:
        ValueError: gamma that is not positive.
    """
    sums = values.masked_fill(~mask, 0.0).sum((1, 2))
    weights = depth_weights(len(values), gamma).to(sums, non_blocking=True)
    return (weights * sums / counts.clamp(min=1).to(sums)).sum()


def masked_sums(stats: TokenStats) -> dict[str, Float[Tensor, " K"]]:
    """Detached sums over the mask at each depth, and ``count``: divide only after both are summed over ranks."""
    per_token = {
        "alpha": stats.log_alpha.exp(),
        "kl": stats.kl,
        "top1": stats.top1,
        "coverage": stats.coverage,
        "accept_prob": stats.accept_prob,
        "count": torch.ones_like(stats.kl),
    }
    return {name: values.detach().masked_fill(~stats.mask, 0.0).sum((1, 2)) for name, values in per_token.items()}
