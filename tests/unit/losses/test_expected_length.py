"""The objectives on the expected length against sums and products written out."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lkspec.losses.expected_length import ExpectedLength, ExpectedLengthLambda
from lkspec.losses.objectives import LKAlpha, LKLambda, depth_weights, reduce_loss
from lkspec.types import TokenStats

NONE = torch.full((1,), torch.nan, dtype=torch.float64)


def stats_of(log_alpha: torch.Tensor, mask: torch.Tensor, kl: torch.Tensor | None = None) -> TokenStats:
    zeros = torch.zeros_like(log_alpha)
    log_alpha = log_alpha.masked_fill(~mask, 0.0)
    kl = zeros if kl is None else kl.masked_fill(~mask, 0.0)
    names = ("reverse_kl", "accept_prob", "top1", "hit", "coverage")
    return TokenStats(mask=mask, log_alpha=log_alpha, kl=kl, **dict.fromkeys(names, zeros))


@given(
    st.lists(st.lists(st.floats(0.001, 1.0), min_size=3, max_size=3), min_size=1, max_size=5),
    st.lists(st.integers(0, 3), min_size=5, max_size=5),
)
@settings(max_examples=50, deadline=None)
def test_values_and_weights(alphas: list[list[float]], depths: list[int]) -> None:
    """Anchors with 0 to 3 supervised depths, each against a loop over its own."""
    alpha = torch.tensor(alphas, dtype=torch.float64).T[:, None].clone()  # [3, 1, T]
    mask = torch.tensor([[[d > k for d in depths[: len(alphas)]]] for k in range(3)])
    log_alpha = alpha.log().requires_grad_()
    values = ExpectedLength().values(stats_of(log_alpha, mask), NONE)
    (slopes,) = torch.autograd.grad(values.sum(), log_alpha)
    for column, (row, known) in enumerate(zip(alphas, depths, strict=False)):
        reached = [math.prod(row[: k + 1]) for k in range(known)]
        accepted = sum(reached)
        expected = -math.log(accepted) if known else 0.0
        assert values[:, 0, column].tolist() == pytest.approx([expected, 0.0, 0.0])
        weights = [-sum(reached[j:known]) / accepted if j < known else 0.0 for j in range(3)]
        assert slopes[:, 0, column].tolist() == pytest.approx(weights)


def test_one_depth_is_lk_alpha() -> None:
    stats = stats_of(torch.tensor([[[-0.5, -3.0]]], dtype=torch.float64), torch.ones(1, 1, 2, dtype=torch.bool))
    assert torch.equal(ExpectedLength().values(stats, NONE), LKAlpha().values(stats, NONE))


def test_gamma_plays_no_part_and_nothing_is_infinite() -> None:
    mask = torch.tensor([[[True, True, False]], [[True, False, False]]])
    log_alpha = torch.tensor([[[-1e4, -2.0, 0.0]], [[-1e4, 0.0, 0.0]]], dtype=torch.float64, requires_grad=True)
    values = ExpectedLength().values(stats_of(log_alpha, mask), NONE)
    losses = [reduce_loss(values, mask, mask.sum((1, 2)), gamma) for gamma in (0.5, 1.0)]
    assert losses[0].item() == losses[1].item() == pytest.approx((1e4 + 2.0) / 2)
    assert depth_weights(2, 0.5)[1] == 0.5
    (slopes,) = torch.autograd.grad(losses[0], log_alpha)
    assert slopes.flatten().tolist() == pytest.approx([-0.5, -0.5, 0.0, 0.0, 0.0, 0.0])


ALPHAS = st.lists(st.lists(st.floats(0.0, 1.0), min_size=3, max_size=3), min_size=1, max_size=5)


@given(
    ALPHAS, st.lists(st.integers(0, 3), min_size=5, max_size=5), st.lists(st.floats(0.0, 1.0), min_size=3, max_size=3)
)
@settings(max_examples=50, deadline=None)
def test_kl_and_accepted_tokens_are_mixed_by_lambda(alphas, depths, means) -> None:
    """Values and both slopes against a loop over each anchor's own depths; alpha may be 0."""
    alpha = torch.tensor(alphas, dtype=torch.float64).T[:, None].clone()
    mask = torch.tensor([[[d > k for d in depths[: len(alphas)]]] for k in range(3)])
    log_alpha, kl = alpha.log().clamp(min=-1e4).requires_grad_(), (3 * (1 - alpha)).requires_grad_()
    values = ExpectedLengthLambda(eta=2.0).values(stats_of(log_alpha, mask, kl), torch.tensor(means))
    slopes, kl_slopes = torch.autograd.grad(values.sum(), (log_alpha, kl))
    lambdas = [math.exp(-2.0 * mean) for mean in means]
    for column, (row, known) in enumerate(zip(alphas, depths, strict=False)):
        reached = [math.prod(row[: k + 1]) for k in range(known)]
        expected = [lambdas[k] * 3 * (1 - row[k]) if k < known else 0.0 for k in range(3)]
        expected[0] += sum((1 - lambdas[k]) * (1 - reached[k]) for k in range(known))
        assert values[:, 0, column].tolist() == pytest.approx(expected, abs=1e-6)
        weights = [-sum((1 - lambdas[k]) * reached[k] for k in range(j, known)) for j in range(3)]
        assert slopes[:, 0, column].tolist() == pytest.approx(weights, abs=1e-6)
        assert kl_slopes[:, 0, column].tolist() == pytest.approx([lambdas[k] if k < known else 0.0 for k in range(3)])


def test_one_depth_is_lk_lambda() -> None:
    log_alpha, kl = torch.tensor([[[-0.5, -3.0]]]), torch.tensor([[[1.0, 2.0]]])
    stats, mean = stats_of(log_alpha, torch.ones(1, 1, 2, dtype=torch.bool), kl), torch.tensor([0.3])
    torch.testing.assert_close(ExpectedLengthLambda(5.0).values(stats, mean), LKLambda(5.0).values(stats, mean))
