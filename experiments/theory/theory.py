"""Objectives where everything can be computed: a Gaussian fitted to a mixture, and gradients of flat drafts.

Both are figures of Samarin et al. 2026 (arXiv 2602.23881): its Figure 2 and its appendix A.5. Densities live on a grid,
whose points stand for the tokens of a vocabulary, and go through the same ``logit_stats`` and objectives as training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lkspec.losses.divergences import logit_stats
from lkspec.losses.objectives import Objective
from lkspec.types import TokenStats
from lkspec.vocab import DraftVocab

#: (weight, mean, standard deviation) of the target density of Figure 2.
MIXTURE = ((0.5, -4.0, 1.0), (0.25, 0.0, 0.5), (0.25, 6.0, 0.5))

_GRID = torch.linspace(-30.0, 30.0, 3001, dtype=torch.float64)  # wide enough for 5 standard deviations of any fit
_MEANS = (-7.0, 8.0)
_DEVIATIONS = (0.3, 7.0)
_NUM_STARTS = 4
_MAX_ALTERNATIONS = 200


@dataclass(frozen=True)
class GaussianFit:
    """Where an objective puts one Gaussian.

    Attributes:
        overlap: sum min(p, q), the acceptance rate.
    """

    mean: float
    deviation: float
    overlap: float


def mixture_density(points: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Density of the mixture."""
    return sum(
        (weight * _gaussian_log_density(points, mean, deviation).exp() for weight, mean, deviation in MIXTURE),
        start=torch.zeros_like(points),
    )


def gaussian_density(points: Float[Tensor, " N"], fit: GaussianFit) -> Float[Tensor, " N"]:
    """Density of a fit."""
    return _gaussian_log_density(points, fit.mean, fit.deviation).exp()


def fit_gaussian(objective: Objective) -> GaussianFit:
    """The Gaussian that minimises an objective against the mixture.

    The best of several descents from the best points of a coarse landscape. An objective whose weights follow the mean
    alpha is no fixed function: its weights are updated and it is minimised in turn, from KL's side (alpha = 0), as
    training does, until nothing moves.
    """
    if objective.scope == "row":
        return _best_descent(objective, None)
    fit = _best_descent(objective, torch.zeros(1, dtype=torch.float64))
    for _ in range(_MAX_ALTERNATIONS):
        start = torch.tensor([fit.mean, math.log(fit.deviation)], dtype=torch.float64)
        following = _descend(objective, torch.tensor([fit.overlap], dtype=torch.float64), start)[1]
        moved = max(abs(following.mean - fit.mean), abs(following.deviation - fit.deviation))
        fit = following
        if moved < 1e-7:
            break
    return fit


def landscape(
    objective: Objective, means: Float[Tensor, " M"], deviations: Float[Tensor, " D"], mean_alpha: Tensor | None = None
) -> Float[Tensor, "D M"]:
    """The objective of Gaussians over their mean and standard deviation; each Gaussian's own alpha unless given."""
    with torch.no_grad():
        rows = [
            torch.stack([_value(objective, torch.stack([mean, deviation.log()]), mean_alpha)[0] for mean in means])
            for deviation in deviations
        ]
    return torch.stack(rows)


def gradient_norms(
    objective: Objective, vocabulary_sizes: Sequence[int], *, support: int = 16
) -> Float[Tensor, " sizes"]:
    """|d loss / d z_q| of a flat draft, q = 1/V, against a target that is flat on ``support`` tokens, p = 1/k.

    Source: appendix A.5: O(1 / sqrt k) for KL and -log alpha, O(sqrt k / V) for TV.
    """
    norms = []
    for size in vocabulary_sizes:
        target = torch.full((size,), -torch.inf, dtype=torch.float64)
        target[:support] = 0.0
        draft = torch.zeros(size, dtype=torch.float64, requires_grad=True)
        value, _ = _objective_value(objective, draft, target, None)
        norms.append(torch.autograd.grad(value, draft)[0].norm())
    return torch.stack(norms)


def _best_descent(objective: Objective, mean_alpha: Tensor | None) -> GaussianFit:
    means = torch.linspace(*_MEANS, 31, dtype=torch.float64)
    deviations = torch.linspace(*_DEVIATIONS, 20, dtype=torch.float64)
    values = landscape(objective, means, deviations, mean_alpha)
    best = values.flatten().argsort()[:_NUM_STARTS]
    starts = [torch.stack([means[i % len(means)], deviations[i // len(means)].log()]) for i in best]
    return min((_descend(objective, mean_alpha, start) for start in starts), key=lambda found: found[0])[1]


def _descend(objective: Objective, mean_alpha: Tensor | None, start: Float[Tensor, " 2"]) -> tuple[float, GaussianFit]:
    """The value and the place of the minimum below a start (mean, log deviation)."""
    place = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [place], max_iter=300, tolerance_grad=1e-12, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = _value(objective, place, mean_alpha)[0]
        value.backward()
        return value

    optimizer.step(closure)
    with torch.no_grad():
        value, alpha = _value(objective, place, mean_alpha)
    return float(value), GaussianFit(
        mean=float(place.detach()[0]), deviation=float(place.detach()[1].exp()), overlap=float(alpha)
    )


def _value(
    objective: Objective, place: Float[Tensor, " 2"], mean_alpha: Tensor | None
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    draft = -0.5 * ((_GRID - place[0]) / place[1].exp()) ** 2
    return _objective_value(objective, draft, mixture_density(_GRID).log(), mean_alpha)


def _objective_value(
    objective: Objective, draft: Float[Tensor, " V"], target: Float[Tensor, " V"], mean_alpha: Tensor | None
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """The objective at one token, and alpha there."""
    token = torch.zeros(1, dtype=torch.int64)
    found = logit_stats(draft[None], target[None], token, DraftVocab.full(len(draft)), row_value=objective.row_value)
    stats = TokenStats(mask=torch.ones(1, 1, 1, dtype=torch.bool), **{name: v[None, None] for name, v in found.items()})
    alpha = found["log_alpha"].detach().exp()
    return objective.values(stats, alpha if mean_alpha is None else mean_alpha).sum(), alpha[0]


def _gaussian_log_density(points: Float[Tensor, " N"], mean: float, deviation: float) -> Float[Tensor, " N"]:
    return -0.5 * ((points - mean) / deviation) ** 2 - math.log(deviation * math.sqrt(2 * math.pi))
