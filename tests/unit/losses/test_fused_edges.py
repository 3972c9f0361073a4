"""token_stats at the edges: infinities, underflow, masked-off entries, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from fused_cases import (
    DIFFERENTIABLE,
    HT,
    B,
    Case,
    K,
    T,
    V,
    as_dict,
    assert_equals_reference,
    gradients,
    make_case,
    masks,
    weighted,
)
from naive_stats import lk_gradient
from torch import Tensor

from lkspec.losses.divergences import LOG_ZERO
from lkspec.losses.fused.in_forward import InForward
from lkspec.losses.objectives import jensen_shannon
from lkspec.types import LinearHead
from lkspec.vocab import DraftVocab


def test_second_derivatives_are_refused():
    case = make_case()
    (slope,) = torch.autograd.grad(case.fused().kl.square().sum(), case.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


@pytest.mark.parametrize("row_value", [None, jensen_shannon], ids=["form_a", "form_b"])
def test_masked_off_entries_may_hold_anything(row_value):
    case = make_case(mask=masks()["holes"])
    used = torch.zeros(B, T, dtype=torch.bool)
    for depth, row, anchor in case.mask.nonzero().tolist():
        used[row, anchor + depth + 1] = True
    nan = float("nan")
    poisoned = replace(
        case,
        hidden=case.hidden.detach().masked_fill(~case.mask[..., None], nan).requires_grad_(),
        target_hidden=case.target_hidden.masked_fill(~used[..., None], nan),
    )
    names = DIFFERENTIABLE if row_value is None else (*DIFFERENTIABLE, "row_value")
    clean_stats, poisoned_stats = (as_dict(c.fused(chunk_size=4, row_value=row_value), names) for c in (case, poisoned))
    for name in names:
        assert torch.equal(clean_stats[name], poisoned_stats[name]), name
    losses = (weighted(clean_stats, names), weighted(poisoned_stats, names))
    for ours, theirs in zip(gradients(poisoned, losses[1]), gradients(case, losses[0]), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.any()


def switched_off(case: Case) -> tuple[Case, Tensor]:
    """Every third target row gets logits of -inf over the draft vocabulary, every second one over ids 3 and 4."""
    weight = torch.cat([case.target_head.weight, torch.zeros(V, 2)], dim=1)
    weight[case.vocab.ids, HT] = -1e30
    weight[3:5, HT + 1] = -1e30
    every = torch.arange(B * T).view(B, T)
    switches = torch.stack([every % 3 == 0, every % 2 == 0], dim=-1) * 1e30  # products overflow to -inf
    off = torch.cat([case.target_hidden, switches.float()], dim=-1)
    return replace(case, target_hidden=off, target_head=LinearHead(weight)), every % 3 == 0


def test_target_logits_of_minus_infinity():
    case, no_mass = switched_off(make_case())
    assert case.target_head.logits(case.target_hidden)[..., case.vocab.ids][no_mass].isneginf().all()
    assert_equals_reference(case)
    stats = case.fused()
    slope = gradients(case, weighted(as_dict(stats)))[0]
    for depth, row, anchor in case.mask.nonzero().tolist():
        if no_mass[row, anchor + depth + 1]:
            here = {name: values[depth, row, anchor].item() for name, values in as_dict(stats).items()}
            assert here["log_alpha"] == LOG_ZERO
            assert here["kl"] == here["reverse_kl"] == here["coverage"] == 0
            assert not slope[depth, row, anchor].any()


def point_case(z_q: Tensor, z_p: Tensor) -> Case:
    """One supervised token with these logits."""
    size = len(z_q)
    hidden, target_hidden = torch.zeros(1, 1, 3, size), torch.zeros(1, 3, size)
    hidden[0, 0, 0], target_hidden[0, 1] = z_q, z_p
    return Case(
        hidden=hidden.requires_grad_(),
        heads=[LinearHead(torch.eye(size))],
        target_hidden=target_hidden,
        target_head=LinearHead(torch.eye(size)),
        vocab=DraftVocab.full(size),
        tokens=torch.zeros(1, 3, dtype=torch.int64),
        mask=torch.tensor([[[True, False, False]]]),
    )


@pytest.mark.parametrize("how", ["recompute", "in_forward"])
@pytest.mark.parametrize("gap", [30.0, 100.0, 200.0])
def test_disjoint_supports_keep_a_useful_gradient(gap: float, how: str):
    """alpha and q underflow in float32 at 200; value and gradient must be those of float64."""
    z_p, z_q = torch.tensor([gap, 0.0, 1.0, 0.5]), torch.tensor([0.0, gap, 0.5, 1.0])
    case = point_case(z_q, z_p)
    alpha, d_alpha = lk_gradient(z_p.double().softmax(0), z_q.double().softmax(0))
    if how == "recompute":
        loss = -case.fused().log_alpha.sum()
    else:
        promised = InForward(values=lambda stats, _: -stats.log_alpha, weights=torch.ones(1))
        value = case.fused(in_forward=promised).value
        assert value is not None
        loss = value.sum()
    assert loss.item() == pytest.approx(-alpha.log().item(), rel=1e-6)
    slope = gradients(case, loss)[0][0, 0, 0]
    assert slope.norm() > 0.5
    assert (slope + d_alpha / alpha).norm() < 1e-4


@pytest.mark.parametrize("how", ["recompute", "in_forward", "form_b"])
def test_a_state_that_is_not_a_number_shows_in_the_loss(how: str):
    """So that training can refuse it by name."""
    case = make_case()
    depth, row, anchor = case.mask.nonzero()[0].tolist()
    broken = case.hidden.detach().clone()
    broken[depth, row, anchor] = torch.nan
    case = replace(case, hidden=broken.requires_grad_())
    promised = InForward(lambda stats, _: -stats.log_alpha, torch.ones(K)) if how == "in_forward" else None
    stats = case.fused(in_forward=promised, row_value=jensen_shannon if how == "form_b" else None)
    values = {"recompute": -stats.log_alpha, "in_forward": stats.value, "form_b": stats.row_value}[how]
    assert values is not None
    loss = values.sum()
    assert loss.isnan()
    assert gradients(case, loss)[0][depth, row, anchor].isnan().all()


@pytest.mark.parametrize("how", ["recompute", "form_b"])
def test_no_gradient_reaches_the_target(how: str):
    case = make_case()
    target_hidden, weight = (t.clone().requires_grad_() for t in (case.target_hidden, case.target_head.weight))
    learning = replace(case, target_hidden=target_hidden, target_head=LinearHead(weight))
    stats = learning.fused(row_value=jensen_shannon if how == "form_b" else None)
    (weighted(as_dict(stats)) if stats.row_value is None else stats.row_value.sum()).backward()
    assert target_hidden.grad is None
    assert weight.grad is None
    assert case.hidden.grad is not None


def test_without_grad_mode():
    case = make_case()
    with torch.no_grad():
        for row_value in (None, jensen_shannon):
            stats = case.fused(row_value=row_value)
            assert not stats.kl.requires_grad
            assert torch.allclose(stats.kl, case.reference().kl, atol=1e-5)


def test_refuses_what_does_not_fit():
    case = make_case()
    with pytest.raises(ValueError, match="one a depth, 3, got 2"):
        replace(case, heads=case.heads[:2]).fused()
    with pytest.raises(ValueError, match="chunk_size"):
        case.fused(chunk_size=0)
    with pytest.raises(ValueError, match="temperature"):
        case.fused(temperature=0.0)
    with pytest.raises(ValueError, match="top_k"):
        case.fused(top_k=-1)
    with pytest.raises(ValueError, match="top_p"):
        case.fused(top_p=0.0)
    past_end = torch.zeros_like(case.mask)
    past_end[0, 0, T - 2] = True
    with pytest.raises(AssertionError, match="past the end"):
        replace(case, mask=past_end).fused()
