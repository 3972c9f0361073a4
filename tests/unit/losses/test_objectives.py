"""Objectives against closed forms, the depth-weighted sum, and the sums that travel between ranks."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import yaml
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_stats import lk_gradient

from lkspec.losses.divergences import logit_stats
from lkspec.losses.objectives import (
    KL,
    TV,
    JensenShannon,
    LKAlpha,
    LKLambda,
    Objective,
    ReverseKL,
    depth_weights,
    jensen_shannon,
    masked_sums,
    reduce_loss,
)
from lkspec.types import TokenStats
from lkspec.vocab import DraftVocab

CONF = Path(__file__).parents[3] / "conf" / "loss"
VOCAB = DraftVocab(torch.tensor([1, 2, 4, 7, 8]), 10)
FULL = DraftVocab.full(10)
K, B, T = 2, 3, 4


def random_logits(*shape: int, seed: int) -> torch.Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stats_of(z_q: torch.Tensor, z_p: torch.Tensor, vocab: DraftVocab, mask: torch.Tensor | None = None) -> TokenStats:
    stats = logit_stats(z_q, z_p, torch.zeros(z_q.shape[:-1], dtype=torch.int64), vocab, row_value=jensen_shannon)
    mask = torch.ones(z_q.shape[:-1], dtype=torch.bool) if mask is None else mask
    return TokenStats(mask=mask, **{name: values.masked_fill(~mask, 0.0) for name, values in stats.items()})


@pytest.mark.parametrize("vocab", [VOCAB, FULL], ids=["truncated", "full"])
@pytest.mark.parametrize("objective", [KL(), TV(), LKAlpha(), LKLambda(), LKLambda(fixed_lambda=0.3)], ids=repr)
def test_values_and_gradients_equal_closed_forms(objective: Objective, vocab: DraftVocab):
    """The gradients of lk_losses.md, one row at a time; KL uses p~ and alpha the original p."""
    z_q = random_logits(K, B, T, vocab.size, seed=0).requires_grad_()
    z_p = random_logits(K, B, T, 10, seed=1)
    mean_alpha = torch.tensor([0.4, 0.7], dtype=torch.float64)
    values = objective.values(stats_of(z_q, z_p, vocab), mean_alpha)
    (slopes,) = torch.autograd.grad(values.sum(), z_q)
    for depth, row, column in torch.ones(K, B, T).nonzero().tolist():
        q = z_q.detach()[depth, row, column].softmax(0)
        p_inside = z_p[depth, row, column].softmax(0)[vocab.ids]
        p_renormed = p_inside / p_inside.sum()
        alpha, alpha_slope = lk_gradient(p_inside, q)
        kl, kl_slope = (p_renormed * (p_renormed / q).log()).sum(), q - p_renormed
        adaptive = math.exp(-3 * [0.4, 0.7][depth])
        value, slope = {
            "kl": (kl, kl_slope),
            "tv": (1 - alpha, -alpha_slope),
            "lk_alpha": (-alpha.log(), -alpha_slope / alpha),
            "lk_lambda(eta=3, adaptive)": (
                adaptive * kl + (1 - adaptive) * (1 - alpha),
                adaptive * kl_slope - (1 - adaptive) * alpha_slope,
            ),
            "lk_lambda(lambda=0.3, fixed)": (0.3 * kl + 0.7 * (1 - alpha), 0.3 * kl_slope - 0.7 * alpha_slope),
        }[objective.describe()]
        assert values[depth, row, column].item() == pytest.approx(value.item(), abs=1e-12)
        assert (slopes[depth, row, column] - slope).norm() < 1e-12 * max(1, slope.norm())


def test_per_token_lambda_is_detached():
    z_q = random_logits(1, 1, 5, 5, seed=2).requires_grad_()
    z_p = random_logits(1, 1, 5, 10, seed=3)
    objective = LKLambda(eta=2.0, per_token=True)
    values = objective.values(stats_of(z_q, z_p, VOCAB), torch.full((1,), float("nan"), dtype=torch.float64))
    (slopes,) = torch.autograd.grad(values.sum(), z_q)
    for column in range(5):
        q, p_inside = z_q.detach()[0, 0, column].softmax(0), z_p[0, 0, column].softmax(0)[VOCAB.ids]
        p_renormed = p_inside / p_inside.sum()
        alpha, alpha_slope = lk_gradient(p_inside, q)
        weight = torch.exp(-2 * alpha)
        value = weight * (p_renormed * (p_renormed / q).log()).sum() + (1 - weight) * (1 - alpha)
        assert values[0, 0, column].item() == pytest.approx(value.item(), abs=1e-12)
        slope = weight * (q - p_renormed) - (1 - weight) * alpha_slope
        assert (slopes[0, 0, column] - slope).norm() < 1e-12
    assert objective.scalars(torch.ones(1)) == {}


def test_lambda_for_logging():
    mean_alpha = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    assert LKLambda(eta=10.0).scalars(mean_alpha)["lambda"].tolist() == pytest.approx([1, math.exp(-5), math.exp(-10)])
    assert LKLambda(fixed_lambda=0.25).scalars(mean_alpha)["lambda"].tolist() == [0.25] * 3
    assert all(
        objective.scalars(mean_alpha) == {} for objective in (KL(), ReverseKL(), TV(), LKAlpha(), JensenShannon())
    )


def test_reverse_kl_and_jensen_shannon():
    z_q, z_p = random_logits(1, 1, 3, 5, seed=4), random_logits(1, 1, 3, 10, seed=5)
    stats = stats_of(z_q, z_p, VOCAB)
    q = z_q.softmax(-1)
    p = z_p[..., VOCAB.ids].softmax(-1)
    middle = (p + q) / 2
    jsd = ((p * (p / middle).log()).sum(-1) + (q * (q / middle).log()).sum(-1)) / 2
    mean_alpha = torch.ones(1)
    assert torch.allclose(ReverseKL().values(stats, mean_alpha), (q * (q / p).log()).sum(-1), atol=1e-12)
    assert torch.allclose(JensenShannon().values(stats, mean_alpha), jsd, atol=1e-12)
    assert JensenShannon().row_value is jensen_shannon
    assert all(objective.row_value is None for objective in (KL(), ReverseKL(), TV(), LKAlpha(), LKLambda()))


def test_jensen_shannon_of_a_point_mass():
    """p a point mass, q = 1/4: JSD = (log(8/5) + 1/4 log(2/5) + 3/4 log 2) / 2; the gradient is finite."""
    z_p = torch.full((1, 4), -torch.inf, dtype=torch.float64)
    z_p[0, 1] = 0.0
    z_q = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    value = jensen_shannon(z_p.log_softmax(-1), z_q.log_softmax(-1))
    expected = (math.log(8 / 5) + math.log(2 / 5) / 4 + 3 * math.log(2) / 4) / 2
    assert value.item() == pytest.approx(expected, abs=1e-12)
    (slope,) = torch.autograd.grad(value.sum(), z_q)
    assert slope.isfinite().all()
    assert slope[0, 1] < 0


@settings(deadline=None, max_examples=60)
@given(z=st.lists(st.tuples(st.floats(-40, 40), st.floats(-40, 40)), min_size=2, max_size=8))
def test_jensen_shannon_lies_between_0_and_log_2(z: list[tuple[float, float]]):
    z_p, z_q = torch.tensor(z, dtype=torch.float64).T
    value = jensen_shannon(z_p.log_softmax(-1)[None], z_q.log_softmax(-1)[None]).item()
    assert -1e-12 <= value <= math.log(2) + 1e-12


@pytest.mark.parametrize(
    "objective", [KL(), ReverseKL(), TV(), LKAlpha(), LKLambda(), LKLambda(per_token=True), JensenShannon()], ids=repr
)
def test_values_are_zero_where_the_mask_is(objective: Objective):
    mask = torch.arange(K * B * T).reshape(K, B, T) % 3 == 0
    stats = stats_of(random_logits(K, B, T, 5, seed=6), random_logits(K, B, T, 10, seed=7), VOCAB, mask)
    values = objective.values(stats, torch.full((K,), 0.5, dtype=torch.float64))
    assert values.shape == (K, B, T)
    assert not values[~mask].any()
    assert values[mask].all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"eta": -1.0}, "eta"),
        ({"eta": float("nan")}, "eta"),
        ({"eta": float("inf")}, "eta"),
        ({"fixed_lambda": 1.5}, "fixed_lambda"),
        ({"fixed_lambda": -0.1}, "fixed_lambda"),
        ({"fixed_lambda": 0.5, "per_token": True}, "exclude each other"),
    ],
)
def test_lk_lambda_refuses(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        LKLambda(**arguments)


def test_depth_weights():
    assert depth_weights(4).tolist() == pytest.approx([1, 0.8, 0.64, 0.512])
    assert depth_weights(3, 1.0).tolist() == [1, 1, 1]
    for gamma in (0.0, -0.5, float("nan")):
        with pytest.raises(ValueError, match="gamma"):
            depth_weights(2, gamma)


def test_reduce_loss_sums_depths_without_dividing_by_the_weights():
    values = random_logits(3, B, T, seed=8).requires_grad_()
    mask = random_logits(3, B, T, seed=9) > 0
    mask[2] = False
    counts = torch.tensor([7, 20, 0])  # of the whole step: more than this micro-batch holds
    loss = reduce_loss(values, mask, counts, gamma=0.5)
    first, second = (sum(values[depth][mask[depth]].tolist()) for depth in range(2))
    assert loss.item() == pytest.approx(first / 7 + 0.5 * second / 20, abs=1e-12)
    (slopes,) = torch.autograd.grad(loss, values)
    expected = mask * torch.tensor([1 / 7, 0.5 / 20, 0.0], dtype=torch.float64)[:, None, None]
    assert torch.allclose(slopes, expected, atol=1e-15)


def test_reduce_loss_ignores_what_masked_entries_hold():
    values = torch.tensor([[[1.0, float("nan"), float("inf")]]], requires_grad=True)
    loss = reduce_loss(values, torch.tensor([[[True, False, False]]]), torch.tensor([1]), 0.8)
    assert loss.item() == 1
    assert torch.autograd.grad(loss, values)[0].tolist() == [[[1, 0, 0]]]


def test_masked_sums():
    mask = random_logits(K, B, T, seed=10) > 0
    stats = stats_of(
        random_logits(K, B, T, 5, seed=11).requires_grad_(), random_logits(K, B, T, 10, seed=12), VOCAB, mask
    )
    sums = masked_sums(stats)
    assert set(sums) == {"alpha", "kl", "top1", "coverage", "accept_prob", "count"}
    assert not any(values.requires_grad for values in sums.values())
    assert sums["count"].tolist() == mask.sum((1, 2)).tolist()
    for depth in range(K):
        alphas = [math.exp(value) for value in stats.log_alpha[depth][mask[depth]].tolist()]
        assert sums["alpha"][depth].item() == pytest.approx(sum(alphas), abs=1e-12)
        for name in ("kl", "top1", "coverage", "accept_prob"):
            assert sums[name][depth].item() == pytest.approx(sum(getattr(stats, name)[depth][mask[depth]].tolist()))


@pytest.mark.parametrize(
    ("name", "described"),
    [
        ("kl", "kl"),
        ("reverse_kl", "reverse_kl"),
        ("tv", "tv"),
        ("lk_alpha", "lk_alpha"),
        ("lk_lambda", "lk_lambda(eta=3, adaptive)"),
        ("lk_lambda_fixed", "lk_lambda(lambda=0.5, fixed)"),
        ("lk_lambda_per_token", "lk_lambda(eta=3, per token)"),
        ("jsd", "jsd"),
        ("expected_length", "expected_length"),
        ("expected_length_lambda", "expected_length_lambda(eta=10)"),
        ("filter_aware", "filter_aware(lk_alpha, top_k=0, top_p=0.9)"),
        ("temperature_mixed", "temperature_mixed(lk_alpha, T=0.3..1)"),
        ("greedy_mixed", "greedy_mixed(lk_alpha, share=0.2)"),
    ],
)
def test_config_files_build_objectives(name: str, described: str):
    arguments = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    assert arguments["_target_"].startswith("lkspec.losses.")
    if name in ("lk_lambda", "lk_lambda_per_token"):  # eta follows the draft
        assert arguments["eta"] == "${draft.paper_eta}"
        arguments["eta"] = 3.0
    assert repr(instantiate(arguments)) == described
