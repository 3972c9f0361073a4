"""Training at many temperatures, so that one draft serves all of them."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from lkspec.losses.divergences import RowValue
from lkspec.losses.objectives import Comparison, Objective
from lkspec.types import TokenStats


class TemperatureMixed(Objective):
    """Another objective at a temperature drawn for each micro-batch, uniform in [low, high], for p and q alike.

    The text stays that of the data; only what is compared at its tokens changes. Temperatures come from torch's own
    generator, which checkpoints keep. Near T = 0 p and q are point masses and alpha is agreement on the largest logit.

    Args:
        base: the objective.
        low, high: the range.

    Raises:
        ValueError: low that is not positive, or above high.
    """

    def __init__(self, base: Objective, *, low: float = 0.3, high: float = 1.0) -> None:
        if not (0 < low <= high and math.isfinite(high)):
            raise ValueError(f"temperature_mixed: expected 0 < low <= high, got low={low} and high={high}")
        self.base, self.low, self.high = base, low, high
        self.scope = base.scope

    @property
    def row_value(self) -> RowValue | None:
        return self.base.row_value

    def comparison(self) -> Comparison:
        drawn = self.low + (self.high - self.low) * float(torch.rand((), dtype=torch.float64))
        return self.base.comparison()._replace(temperature=drawn)

    def values(self, stats: TokenStats, mean_alpha: Float[Tensor, " K"]) -> Float[Tensor, "K B T"]:
        return self.base.values(stats, mean_alpha)

    def scalars(self, mean_alpha: Float[Tensor, " K"]) -> dict[str, Float[Tensor, " K"]]:
        return self.base.scalars(mean_alpha)

    def describe(self) -> str:
        return f"temperature_mixed({self.base.describe()}, T={self.low:g}..{self.high:g})"
