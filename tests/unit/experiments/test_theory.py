"""Figure 2 and the gradient norms of the paper."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from theory import MIXTURE, GaussianFit, fit_gaussian, gradient_norms, landscape
from theory_figures import fits_figure, gradient_norms_figure, landscapes_figure

from lkspec.losses.objectives import KL, TV, LKAlpha, LKLambda, Objective, ReverseKL

SIZES = [2**10, 2**12, 2**14]


@cache
def fitted(objective: type[Objective]) -> GaussianFit:
    return fit_gaussian(objective())


@pytest.mark.parametrize(
    ("objective", "mean", "deviation", "overlap"),
    [(KL, -0.50, 4.17, (0.502,)), (ReverseKL, -3.93, 1.10, (0.507, 0.508)), (TV, -2.96, 2.04, (0.602,))],
)
@pytest.mark.slow
def test_the_numbers_of_figure_2(
    objective: type[Objective], mean: float, deviation: float, overlap: tuple[float, ...]
) -> None:
    fit = fitted(objective)
    assert (round(fit.mean, 2), round(fit.deviation, 2)) == (mean, pytest.approx(deviation, abs=0.0051))
    assert round(fit.overlap, 3) in overlap


@pytest.mark.slow
def test_kl_matches_the_moments_of_the_mixture() -> None:
    mean = sum(weight * center for weight, center, _ in MIXTURE)
    variance = sum(weight * (deviation**2 + center**2) for weight, center, deviation in MIXTURE) - mean**2
    fit = fitted(KL)
    assert fit.mean == pytest.approx(mean, abs=1e-6)
    assert fit.deviation == pytest.approx(math.sqrt(variance), abs=1e-6)


@pytest.mark.slow
def test_lk_alpha_has_the_optimum_of_tv_and_lk_lambda_lies_between_kl_and_tv() -> None:
    tv, alpha = fitted(TV), fitted(LKAlpha)
    assert (alpha.mean, alpha.deviation) == (pytest.approx(tv.mean, abs=1e-4), pytest.approx(tv.deviation, abs=1e-4))
    fits = [fit_gaussian(LKLambda(eta)) for eta in (1.0, 3.0, 10.0)]
    overlaps = [fitted(KL).overlap, *(fit.overlap for fit in fits), tv.overlap]
    assert overlaps == sorted(overlaps)
    # A fixed point: with the weights that its own alpha gives, it cannot be improved.
    fit = fits[1]
    around = landscape(
        LKLambda(3.0),
        fit.mean + torch.tensor([-0.01, 0.0, 0.01], dtype=torch.float64),
        fit.deviation + torch.tensor([-0.01, 0.0, 0.01], dtype=torch.float64),
        torch.tensor([fit.overlap], dtype=torch.float64),
    )
    assert around.argmin() == 4


@pytest.mark.parametrize(("objective", "slope"), [(KL(), 0.0), (LKAlpha(), 0.0), (TV(), -1.0)])
def test_how_gradients_of_a_flat_draft_depend_on_the_vocabulary(objective: Objective, slope: float) -> None:
    norms = gradient_norms(objective, SIZES).log()
    slopes = norms.diff() / torch.tensor(SIZES, dtype=torch.float64).log().diff()
    assert torch.allclose(slopes, torch.full_like(slopes, slope), atol=0.01)


def test_gradient_norms_in_closed_form() -> None:
    size, support = 1024, 16
    inside, outside = support, size - support
    kl = math.sqrt(inside * (1 / size - 1 / support) ** 2 + outside / size**2)
    share = support / size  # m = sum q M: TV's gradient is -q (M - m)
    tv = math.sqrt(inside * (1 - share) ** 2 + outside * share**2) / size
    assert gradient_norms(KL(), [size], support=support).item() == pytest.approx(kl, rel=1e-12)
    assert gradient_norms(TV(), [size], support=support).item() == pytest.approx(tv, rel=1e-12)
    assert gradient_norms(LKAlpha(), [size], support=support).item() == pytest.approx(tv / share, rel=1e-12)


def test_pictures_hold_every_objective() -> None:
    fits = {"kl": GaussianFit(-0.5, 4.2, 0.502), "tv": GaussianFit(-3.0, 2.0, 0.602)}
    axis = torch.linspace(1.0, 2.0, 5, dtype=torch.float64)
    labels = [text.get_text() for text in fits_figure(fits).legends[0].get_texts()]
    assert labels == ["target p", "kl: overlap 50.2%", "tv: overlap 60.2%"]
    panels = landscapes_figure({"kl": torch.rand(5, 5)}, axis, axis, fits).axes
    assert [panel.get_title() for panel in panels] == ["kl"]
    norms = {name: gradient_norms(objective, SIZES) for name, objective in (("kl", KL()), ("tv", TV()))}
    lines = gradient_norms_figure(norms, SIZES).axes[0].get_lines()
    assert [list(line.get_ydata()) for line in lines] == [values.tolist() for values in norms.values()]
