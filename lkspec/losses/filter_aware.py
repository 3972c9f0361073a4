"""Training against the target as it will be sampled: p filtered by top-k and top-p, q as the draft gives it."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from lkspec.losses.divergences import RowValue
from lkspec.losses.objectives import Comparison, Objective
from lkspec.losses.target_filter import TargetFilter
from lkspec.types import TokenStats


class FilterAware(Objective):
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
        self.base, self.top_k, self.top_p = base, top_k, top_p
        self.scope = base.scope

    @property
    def row_value(self) -> RowValue | None:
        return self.base.row_value

    def comparison(self) -> Comparison:
        return self.base.comparison()._replace(top_k=self.top_k, top_p=self.top_p)

    def values(self, stats: TokenStats, mean_alpha: Float[Tensor, " K"]) -> Float[Tensor, "K B T"]:
        return self.base.values(stats, mean_alpha)

    def scalars(self, mean_alpha: Float[Tensor, " K"]) -> dict[str, Float[Tensor, " K"]]:
        return self.base.scalars(mean_alpha)

    def describe(self) -> str:
        return f"filter_aware({self.base.describe()}, top_k={self.top_k}, top_p={self.top_p:g})"
