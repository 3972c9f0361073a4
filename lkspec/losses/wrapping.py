"""Objectives that change one thing about another one, and leave the rest to it."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from lkspec.losses.divergences import RowValue
from lkspec.losses.objectives import Comparison, Objective
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
