"""token_stats against the readable form, and against loops and closed forms in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from fused_cases import (
    DIFFERENTIABLE,
    FULL,
    NAMES,
    TEMPERATURES,
    TRUNCATED,
    Case,
    as_dict,
    assert_close,
    assert_equals_reference,
    gradients,
    make_case,
    masks,
    naive,
    normal,
    weighted,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_stats import lk_gradient
from torch import Tensor

from lkspec.losses.objectives import (
    KL,
    TV,
    JensenShannon,
    LKAlpha,
    LKLambda,
    Objective,
    ReverseKL,
    reduce_loss,
)
from lkspec.vocab import DraftVocab

OBJECTIVES = [KL(), ReverseKL(), TV(), LKAlpha(), LKLambda(), LKLambda(10.0), LKLambda(fixed_lambda=0.3)]
OBJECTIVES += [LKLambda(per_token=True), JensenShannon()]


@pytest.mark.parametrize("chunk_size", [1, 4, 1000, None])
@pytest.mark.parametrize("shaped", [False, True], ids=["plain", "scale_bias_cap"])
@pytest.mark.parametrize("heads", ["AAA", "ABC", "ABA"])
@pytest.mark.parametrize("vocab", [TRUNCATED, FULL], ids=["truncated", "full"])
def test_equals_reference(vocab: DraftVocab, heads: str, shaped: bool, chunk_size: int | None):
    assert_equals_reference(make_case(vocab=vocab, heads=heads, shaped=shaped), chunk_size=chunk_size)


@pytest.mark.parametrize("frozen", ["heads", "hidden"])
@pytest.mark.parametrize("shaped", [False, True], ids=["plain", "scale_bias_cap"])
def test_frozen_parts_take_no_gradient(frozen: str, shaped: bool):
    case = make_case(shaped=shaped, frozen=frozen)
    assert len(case.leaves) == (1 if frozen == "heads" else 3 * (1 + shaped))
    assert_equals_reference(case)


def test_only_the_bias_or_only_the_weight_learns():
    case = make_case(heads="AAA", shaped=True, frozen="heads")
    head = case.heads[0]
    assert head.bias is not None
    for part in (head.weight, head.bias):
        part.requires_grad_()
        assert_equals_reference(case)
        part.requires_grad_(False)


@pytest.mark.parametrize("mask", masks().values(), ids=masks().keys())
@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7, TEMPERATURES], ids=["1", "0.6", "1.7", "by_row"])
def test_masks_and_temperatures(mask: Tensor, temperature: float | Tensor):
    assert_equals_reference(make_case(mask=mask, shaped=True), temperature=temperature)


def test_hidden_states_of_any_layout():
    case = make_case()
    leaf = case.hidden.detach().permute(2, 0, 3, 1).contiguous().requires_grad_()
    case = replace(case, hidden=leaf.permute(1, 3, 0, 2))
    assert not case.hidden.is_contiguous()
    ours, theirs = (torch.autograd.grad(weighted(as_dict(s)), leaf)[0] for s in (case.fused(), case.reference()))
    assert_close(ours, theirs, 1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
@pytest.mark.parametrize("vocab", [TRUNCATED, FULL], ids=["truncated", "full"])
def test_every_objective(vocab: DraftVocab, objective: Objective):
    case = make_case(vocab=vocab, shaped=True, mask=masks()["holes"])
    counts = case.mask.sum((1, 2))
    losses = []
    for stats in (case.fused(row_value=objective.row_value), case.reference(row_value=objective.row_value)):
        mean_alpha = (stats.log_alpha.detach().exp() * case.mask).sum((1, 2)) / counts
        losses.append(reduce_loss(objective.values(stats, mean_alpha), case.mask, counts))
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    for ours, theirs in zip(*(gradients(case, loss) for loss in losses), strict=True):
        assert theirs.any()
        assert_close(ours, theirs, 1e-5)


@pytest.mark.parametrize("names", [(name,) for name in DIFFERENTIABLE] + [("kl", "log_alpha")], ids=repr)
def test_a_loss_of_some_statistics(names: tuple[str, ...]):
    case = make_case()
    ours, theirs = (gradients(case, weighted(as_dict(stats), names)) for stats in (case.fused(), case.reference()))
    for one, two in zip(ours, theirs, strict=True):
        assert_close(one, two, 1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.6, TEMPERATURES.double()], ids=["1", "0.6", "by_row"])
@pytest.mark.parametrize("vocab", [TRUNCATED, FULL], ids=["truncated", "full"])
def test_float64_equals_naive_loop(vocab: DraftVocab, temperature: float | Tensor):
    case = make_case(vocab=vocab, heads="ABA", shaped=True, mask=masks()["holes"], dtype=torch.float64)
    ours, expected = as_dict(case.fused(temperature=temperature, chunk_size=4)), naive(case, temperature)
    for name in NAMES:
        assert torch.allclose(ours[name], expected[name], atol=1e-12), name
    for one, two in zip(gradients(case, weighted(ours)), gradients(case, weighted(expected)), strict=True):
        assert_close(one, two, 1e-11)


def test_float64_gradients_equal_closed_forms():
    """Those of lk_losses.md at each row, carried to hidden states and weights by hand."""
    case = make_case(heads="AAA", dtype=torch.float64)
    weight = case.heads[0].weight
    stats = as_dict(case.fused(chunk_size=4))
    for name in DIFFERENTIABLE:
        d_hidden, d_weight = torch.zeros_like(case.hidden), torch.zeros_like(weight)
        for depth, row, anchor in case.mask.nonzero().tolist():
            hidden = case.hidden[depth, row, anchor].detach()
            q = (weight.detach() @ hidden).softmax(0)
            p = (case.target_head.weight @ case.target_hidden[row, anchor + depth + 1]).softmax(0)[case.vocab.ids]
            alpha, d_alpha = lk_gradient(p, q)
            renormed = p / p.sum()
            log_ratio = (q / renormed).log()
            slope = {
                "kl": q - renormed,
                "log_alpha": d_alpha / alpha,
                "reverse_kl": q * (log_ratio - (q * log_ratio).sum()),
            }[name]
            d_hidden[depth, row, anchor] = slope @ weight.detach()
            d_weight += slope[:, None] * hidden
        slopes = torch.autograd.grad(stats[name].sum(), case.leaves, retain_graph=True)
        for ours, theirs in zip(slopes, (d_hidden, d_weight), strict=True):
            assert_close(ours, theirs, 1e-11, name)


def test_gradcheck():
    vocab = DraftVocab(torch.tensor([0, 1, 3, 4]), 6)
    mask = torch.tensor([[[1, 0, 1, 0, 0]], [[1, 1, 0, 0, 0]]]).bool()
    case = make_case(vocab=vocab, heads="AA", mask=mask, shaped=True, dtype=torch.float64)
    head, temperatures = case.heads[0], torch.linspace(0.5, 1.5, 5, dtype=torch.float64)[None]

    def statistics(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        draft = replace(head, weight=weight, bias=bias)
        stats = replace(case, hidden=hidden, heads=[draft, draft]).fused(temperature=temperatures, chunk_size=2)
        return stats.kl, stats.reverse_kl, stats.log_alpha

    assert torch.autograd.gradcheck(statistics, (case.hidden, head.weight, head.bias))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any shapes, any part of the anchors whose proposals lie inside the row."""
    num_depths, size, length = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(2, 8))
    target_size = draw(st.integers(2, 7))
    ids = draw(st.sets(st.integers(0, target_size - 1), min_size=1))
    mask = normal(num_depths, size, length, seed=draw(st.integers(0, 99))) > draw(st.sampled_from([-9.0, 0.0, 1.0]))
    for depth in range(1, num_depths + 1):
        mask[depth - 1, :, max(0, length - 1 - depth) :] = False
    return make_case(
        vocab=DraftVocab(torch.tensor(sorted(ids)), target_size),
        heads=draw(st.sampled_from(["AAAA", "ABCD"]))[:num_depths],
        shaped=draw(st.booleans()),
        mask=mask,
        dtype=torch.float64,
    )


@settings(deadline=None, max_examples=30)
@given(case=cases(), chunk_size=st.integers(1, 9), temperature=st.sampled_from([1.0, 0.5]))
def test_any_shape(case: Case, chunk_size: int, temperature: float):
    ours = as_dict(case.fused(chunk_size=chunk_size, temperature=temperature))
    theirs = as_dict(case.reference(temperature=temperature))
    for name in NAMES:
        assert torch.allclose(ours[name], theirs[name], atol=1e-10), name
    for one, two in zip(gradients(case, weighted(ours)), gradients(case, weighted(theirs)), strict=True):
        assert (one - two).norm() <= 1e-10 * max(1, two.norm())
