"""Training against the target as it will be sampled: p filtered by top-k and top-p, q as the draft gives it."""

from __future__ import annotations

from lkspec.losses.objectives import Comparison, Objective
from lkspec.losses.target_filter import TargetFilter
from lkspec.losses.wrapping import Wrapping


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
