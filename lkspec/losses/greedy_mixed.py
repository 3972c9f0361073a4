"""Training for greedy decoding as well as for sampling."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from lkspec.losses.divergences import RowValue
from lkspec.losses.objectives import Objective
from lkspec.losses.wrapping import Wrapping
from lkspec.types import TokenStats


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
