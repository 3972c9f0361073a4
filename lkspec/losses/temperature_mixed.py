"""Training at many temperatures, so that one draft serves all of them."""

from __future__ import annotations

import math

import torch

from lkspec.losses.objectives import Comparison, Objective
from lkspec.losses.wrapping import Wrapping


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
