"""Objectives that change one thing about another one, and leave the rest to it."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from lkspec.losses.divergences import RowValue
from lkspec.losses.objectives import Comparison, Objective
from lkspec.losses.target_filter import TargetFilter
from lkspec.types import TokenStats


class Wrapping(Objective):
    """Another objective; subclasses change which p and q it sees (``comparison``), or add to its values.

    Args:
        base: the objective.
    """

    def __init__(self, base: Objective) -> None:
        self.base = base
        self.scope = base.scope

    @property
    def row_value(self) -> RowValue | None:
        return self.base.row_value

    def comparison(self, shape: tuple[int, ...]) -> Comparison:
        return self.base.comparison(shape)

    def values(self, stats: TokenStats, mean_alpha: Float[Tensor, " K"]) -> Float[Tensor, "K B T"]:
        return self.base.values(stats, mean_alpha)

    def scalars(self, mean_alpha: Float[Tensor, " K"]) -> dict[str, Float[Tensor, " K"]]:
        return self.base.scalars(mean_alpha)


class FilterAware(Wrapping):
    """Another objective on alpha_f = sum_v min(q_v, p_f(v)), with p_f = p filtered by top-k, then top-p, renormalised.

    Mass that q spends on tokens the server never samples counts as rejected, which it will be. A row whose q lies
    wholly outside the kept tokens has alpha_f near 0 and, under ``lk_alpha`` and ``kl``, a gradient towards them.

    Args:
        base: the objective.
        top_k: 0 keeps all.
        top_p: 1 keeps all.

    Raises:
        ValueError: top_k below 0, top_p outside (0, 1], or neither filters.
    """

    def __init__(self, base: Objective, *, top_k: int = 0, top_p: float = 1.0) -> None:
        if not TargetFilter(top_k, top_p).is_on:
            raise ValueError(
                "filter_aware: top_k=0 and top_p=1 filter nothing; set one of them, or train with its base"
            )
        super().__init__(base)
        self.top_k, self.top_p = top_k, top_p

    def comparison(self, shape: tuple[int, ...]) -> Comparison:
        return self.base.comparison(shape)._replace(top_k=self.top_k, top_p=self.top_p)

    def describe(self) -> str:
        return f"filter_aware({self.base.describe()}, top_k={self.top_k}, top_p={self.top_p:g})"


class TemperatureMixed(Wrapping):
    """Another objective at a temperature drawn for each token, uniform in [low, high], for p and q alike.

    The text stays that of the data; only what is compared at its tokens changes. A token has the same temperature at
    all depths that propose it. Temperatures come from torch's own generator, which checkpoints keep. Near T = 0 p and q
    are point masses and alpha is agreement on the largest logit.

    Args:
        base: the objective.
        low, high: the range.

    Raises:
        ValueError: low that is not positive, or above high.
    """

    def __init__(self, base: Objective, *, low: float = 0.3, high: float = 1.0) -> None:
        if not (0 < low <= high and math.isfinite(high)):
            raise ValueError(f"temperature_mixed: expected 0 < low <= high, got low={low} and high={high}")
        super().__init__(base)
        self.low, self.high = low, high

    def comparison(self, shape: tuple[int, ...]) -> Comparison:
        drawn = torch.empty(shape, device="cpu").uniform_(self.low, self.high)
        return self.base.comparison(shape)._replace(temperature=drawn)

    def describe(self) -> str:
        return f"temperature_mixed({self.base.describe()}, T={self.low:g}..{self.high:g})"


class GreedyMixed(Wrapping):
    """(1 - share) base - share log q(x*), with x* = argmax p over the draft vocabulary.

    Decoding at T = 0 accepts x* alone. There p is a point mass, and -log alpha against a point mass is -log q(x*): with
    ``lk_alpha`` as the base this is ``lk_alpha`` at T = 1 and at T = 0, mixed for each token.

    Args:
        base: the objective for sampling.
        share: of the greedy part.

    Raises:
        ValueError: share outside [0, 1], or a base of form (b), as the statistics hold one such value per row.
    """

    def __init__(self, base: Objective, *, share: float = 0.2) -> None:
        if not 0 <= share <= 1:
            raise ValueError(f"greedy_mixed: share must lie in [0, 1], got {share}")
        if base.row_value is not None:
            raise ValueError(f"greedy_mixed: {base.describe()} has a value a row of its own; mix another objective")
        super().__init__(base)
        self.share = share

    @property
    def row_value(self) -> RowValue:
        return surprise_of_argmax

    def values(self, stats: TokenStats, mean_alpha: Float[Tensor, " K"]) -> Float[Tensor, "K B T"]:
        assert stats.row_value is not None, "token_stats was not given this objective's row_value"
        return (1 - self.share) * self.base.values(stats, mean_alpha) + self.share * stats.row_value

    def describe(self) -> str:
        return f"greedy_mixed({self.base.describe()}, share={self.share:g})"


def surprise_of_argmax(logp: Float[Tensor, "*rows D"], logq: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows"]:
    """-log q of the token that p likes most."""
    return -logq.gather(-1, logp.argmax(-1, keepdim=True)).squeeze(-1)
