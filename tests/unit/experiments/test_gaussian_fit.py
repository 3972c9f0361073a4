"""Figure 2 of the paper: one Gaussian fitted to a mixture; which one each divergence prefers, and its overlap."""

from __future__ import annotations

import torch
from torch import Tensor

from lkspec.losses.divergences import logit_stats
from lkspec.vocab import DraftVocab

GRID = torch.linspace(-30, 30, 1501, dtype=torch.float64)
#: Starting points (mean, standard deviation); the best of their fits counts.
STARTS = torch.tensor([[-4.0, 1.0], [-2.0, 2.0], [0.0, 4.0], [0.0, 0.5], [6.0, 0.5]], dtype=torch.float64)


def log_density(mean: Tensor | float, deviation: Tensor | float) -> Tensor:
    """Up to a constant that all densities share."""
    deviation = torch.as_tensor(deviation, dtype=torch.float64)
    return -0.5 * ((GRID - mean) / deviation) ** 2 - deviation.log()


MIXTURE = torch.stack(
    [log_density(mean, deviation) + torch.tensor(weight, dtype=torch.float64).log()
     for weight, mean, deviation in ((0.5, -4.0, 1.0), (0.25, 0.0, 0.5), (0.25, 6.0, 0.5))]
).logsumexp(0)  # fmt: skip


def stats_of(mean: Tensor, log_deviation: Tensor) -> dict[str, Tensor]:
    draft = log_density(mean[:, None], log_deviation.exp()[:, None])
    tokens = torch.zeros(len(mean), dtype=torch.int64)
    return logit_stats(draft, MIXTURE.expand(len(mean), -1), tokens, DraftVocab.full(len(GRID)))


def fit(name: str) -> tuple[float, float, float]:
    """(mean, standard deviation, overlap in percent) of the best Gaussian."""
    mean = STARTS[:, 0].clone().requires_grad_()
    log_deviation = STARTS[:, 1].log().requires_grad_()
    optimizer = torch.optim.Adam([mean, log_deviation], lr=0.05)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 500)
    for _ in range(500):
        stats = stats_of(mean, log_deviation)
        losses = -stats["log_alpha"].exp() if name == "tv" else stats[name]
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()
        scheduler.step()
    best = int(losses.argmin())
    overlap = stats_of(mean, log_deviation)["log_alpha"][best].exp().item()
    return mean[best].item(), log_deviation[best].exp().item(), 100 * overlap


def assert_fit(name: str, mean: float, deviation: float, overlap: tuple[float, float]) -> None:
    """To half a unit of the last printed digit."""
    found_mean, found_deviation, found_overlap = fit(name)
    assert abs(found_mean - mean) <= 0.005
    assert abs(found_deviation - deviation) <= 0.005
    assert overlap[0] - 0.05 <= found_overlap <= overlap[1] + 0.05


def test_kl():
    assert_fit("kl", -0.50, 4.17, (50.2, 50.2))


def test_reverse_kl():
    assert_fit("reverse_kl", -3.93, 1.10, (50.7, 50.8))


def test_tv():
    assert_fit("tv", -2.96, 2.04, (60.2, 60.2))
