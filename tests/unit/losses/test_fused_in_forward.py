"""Gradients formed in the forward pass; and both modes in bfloat16, against float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from fused_cases import (
    DIFFERENTIABLE,
    FULL,
    TEMPERATURES,
    TRUNCATED,
    Case,
    K,
    as_dict,
    assert_close,
    counts,
    gradients,
    in_forward,
    make_case,
    masks,
    normal,
    weighted,
)
from torch import Tensor

from lkspec.losses.expected_length import ExpectedLength
from lkspec.losses.fused.in_forward import InForward
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
from lkspec.types import LinearHead, TokenStats
from lkspec.vocab import DraftVocab

OF_THE_ROW = [KL(), ReverseKL(), TV(), LKAlpha(), LKLambda(fixed_lambda=0.3), LKLambda(per_token=True)]
OF_THE_ROW += [JensenShannon()]
UNUSED = torch.zeros(K)  # mean_alpha, of objectives that do not read it


def loss_in_forward(case: Case, objective: Objective, gamma: float = 0.8, **options) -> Tensor:
    stats = case.fused(in_forward=in_forward(objective, case, gamma), row_value=objective.row_value, **options)
    assert stats.value is not None
    return reduce_loss(stats.value, case.mask, counts(case), gamma)


def loss_of_reference(case: Case, objective: Objective, gamma: float = 0.8, **options) -> Tensor:
    stats = case.reference(row_value=objective.row_value, **options)
    return reduce_loss(objective.values(stats, UNUSED), case.mask, counts(case), gamma)


@pytest.mark.parametrize("temperature", [0.8, TEMPERATURES], ids=["0.8", "by_row"])
@pytest.mark.parametrize("factor", [1.0, 8.0, -0.01])
@pytest.mark.parametrize("objective", OF_THE_ROW, ids=repr)
@pytest.mark.parametrize("vocab", [TRUNCATED, FULL], ids=["truncated", "full"])
def test_equals_reference(vocab: DraftVocab, objective: Objective, factor: float, temperature: float | Tensor):
    """``factor`` is what DDP's world size, or a loss scale, multiplies the loss by."""
    case = make_case(vocab=vocab, heads="ABA", shaped=True, mask=masks()["holes"])
    ours = loss_in_forward(case, objective, gamma=0.5, temperature=temperature, chunk_size=4)
    theirs = loss_of_reference(case, objective, gamma=0.5, temperature=temperature)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    for one, two in zip(gradients(case, factor * ours), gradients(case, factor * theirs), strict=True):
        assert_close(one, two, 1e-5)


@pytest.mark.parametrize("frozen", ["heads", "hidden"])
@pytest.mark.parametrize("mask", masks().values(), ids=masks().keys())
def test_masks_and_frozen_parts(mask: Tensor, frozen: str):
    case = make_case(mask=mask, frozen=frozen)
    ours, theirs = (gradients(case, loss(case, LKAlpha())) for loss in (loss_in_forward, loss_of_reference))
    assert len(ours) == (1 if frozen == "heads" else K)
    for one, two in zip(ours, theirs, strict=True):
        assert_close(one, two, 1e-5)
        assert one.any() or not two.any()


def test_masked_off_entries_may_hold_anything():
    case = make_case(mask=masks()["holes"])
    nan = case.hidden.detach().masked_fill(~case.mask[..., None], torch.nan).requires_grad_()
    poisoned = replace(case, hidden=nan)
    for one, two in zip(*(gradients(c, loss_in_forward(c, KL())) for c in (poisoned, case)), strict=True):
        assert torch.equal(one, two)


def test_values_of_rows_and_a_second_backward():
    case, objective = make_case(), LKAlpha()
    stats = case.fused(in_forward=in_forward(objective, case))
    assert stats.value is not None
    assert torch.allclose(stats.value, objective.values(case.reference(), UNUSED), atol=1e-5)
    loss = reduce_loss(stats.value, case.mask, counts(case))
    once = torch.autograd.grad(loss, case.leaves, retain_graph=True)
    for one, two in zip(once, gradients(case, loss), strict=True):
        assert torch.equal(one, two)


def test_other_statistics_carry_no_gradient():
    case = make_case()
    stats = case.fused(in_forward=in_forward(KL(), case))
    assert stats.value is not None
    assert stats.value.requires_grad
    for name, values in as_dict(stats).items():
        assert not values.requires_grad, name
        assert torch.allclose(values, getattr(case.reference(), name), atol=1e-5), name


@pytest.mark.parametrize("mask", masks().values(), ids=masks().keys())
@pytest.mark.parametrize("shaped", [False, True], ids=["plain", "scale_bias_cap"])
def test_adaptive_lambda_where_one_chunk_holds_all_rows(shaped: bool, mask: Tensor):
    """Its mean alpha is that of the micro-batch, though the loss is divided by the counts of more."""
    case, objective = make_case(heads="ABA", shaped=shaped, mask=mask), LKLambda(eta=3.0)
    ours = loss_in_forward(case, objective, chunk_size=mask[0].numel())
    stats = case.reference()
    mean_alpha = (stats.log_alpha.detach().exp() * mask).sum((1, 2)) / mask.sum((1, 2)).clamp(min=1)
    theirs = reduce_loss(objective.values(stats, mean_alpha), mask, counts(case))
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    for one, two in zip(gradients(case, ours), gradients(case, theirs), strict=True):
        assert_close(one, two, 1e-5)


def test_adaptive_lambda_over_several_chunks_is_recomputed():
    case = make_case()
    stats = case.fused(chunk_size=4, in_forward=in_forward(LKLambda(), case))
    assert stats.value is None
    assert stats.kl.requires_grad


def test_objectives_over_several_depths_are_recomputed():
    assert InForward.of(ExpectedLength(), torch.ones(K)) is None


def test_mean_alpha_cannot_be_read_silently():
    """It is NaN while the gradient of an objective that says it reads rows alone is formed."""
    case = make_case()
    value = case.fused(in_forward=InForward(LKLambda(eta=3.0).values, torch.ones(K))).value
    assert value is not None
    assert value[case.mask].isnan().all()
    for slope in gradients(case, value.sum()):
        assert slope.isnan().any()


@pytest.mark.parametrize(
    "loss",
    [
        lambda values, case: values.sum(),
        lambda values, case: reduce_loss(values, case.mask, counts(case), gamma=0.7),
        lambda values, case: reduce_loss(values, case.mask, counts(case) + torch.tensor([1, 0, 0])),
        lambda values, case: reduce_loss(values[:, :1], case.mask[:, :1], counts(case)),
        lambda values, case: values.square().sum(),
    ],
    ids=["no_weights", "other_gamma", "other_counts", "a_part", "not_linear"],
)
def test_a_loss_with_other_weights_is_refused(loss: Callable[[Tensor, Case], Tensor]):
    case = make_case()
    value = case.fused(in_forward=in_forward(KL(), case)).value
    assert value is not None
    with pytest.raises(AssertionError, match="other weights than promised"):
        gradients(case, loss(value, case))


def test_values_that_are_not_one_a_row_are_refused():
    """A mean_alpha of K depths would broadcast rows of one depth to K, and their slopes would add up."""
    case = make_case()

    def broadcast(stats: TokenStats, mean_alpha: Tensor) -> Tensor:
        return LKLambda(fixed_lambda=0.3).values(stats, torch.full((K,), torch.nan))

    with pytest.raises(AssertionError, match=r"\[1, 1, R\]"):
        case.fused(in_forward=InForward(broadcast, torch.ones(K)))


# bfloat16: cases of a size at which rounding errors average out.


def wide_case(dtype: torch.dtype, *, shaped: bool) -> Case:
    size = 97
    mask = torch.ones(2, 2, 32, dtype=torch.bool)
    mask[0, :, -2:] = mask[1, :, -3:] = False
    vocab = DraftVocab(torch.arange(0, size, 2), size)
    return make_case(vocab=vocab, heads="AA", mask=mask, shaped=shaped, dtype=dtype)


def in_float64(case: Case) -> Case:
    """The same numbers, in a precision that rounds nothing."""

    def double(head: LinearHead) -> LinearHead:
        bias = None if head.bias is None else head.bias.detach().double().requires_grad_(head.bias.requires_grad)
        weight = head.weight.detach().double().requires_grad_(head.weight.requires_grad)
        return replace(head, weight=weight, bias=bias)

    (head,) = {id(head): double(head) for head in case.heads}.values()
    return replace(
        case,
        hidden=case.hidden.detach().double().requires_grad_(),
        heads=[head] * len(case.heads),
        target_hidden=case.target_hidden.double(),
        target_head=double(case.target_head),
    )


def assert_no_worse(ours: Tensor, theirs: Tensor, truth: Tensor, what: object) -> None:
    """1.5 times the reference's own error, and a floor of 1e-3 (bfloat16 resolves 4e-3)."""
    assert ours.dtype == theirs.dtype, what
    assert (ours - truth).norm() <= 1.5 * (theirs - truth).norm() + 1e-3 * truth.norm(), what


@pytest.mark.parametrize("shaped", [False, True], ids=["plain", "scale_bias_cap"])
@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16", "autocast"])
def test_bfloat16_statistics_and_recomputed_gradients(autocast: bool, shaped: bool):
    case = wide_case(torch.float32 if autocast else torch.bfloat16, shaped=shaped)
    exact = in_float64(case)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours, theirs = case.fused(chunk_size=8), case.reference()
    truth = as_dict(exact.reference())
    for name, values in truth.items():
        assert_no_worse(getattr(ours, name), getattr(theirs, name), values, name)
    assert (ours.log_alpha - truth["log_alpha"]).abs().max() > 1e-4, "products were not rounded to bfloat16"
    slopes = [gradients(c, weighted(as_dict(s))) for c, s in ((case, ours), (case, theirs))]
    for i, (one, two, three) in enumerate(zip(*slopes, gradients(exact, weighted(truth)), strict=True)):
        assert one.dtype == case.leaves[i].dtype
        assert_no_worse(one, two, three, i)


@pytest.mark.parametrize("objective", [KL(), LKAlpha()], ids=repr)
@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16", "autocast"])
def test_bfloat16_gradients_in_forward(autocast: bool, objective: Objective):
    case = wide_case(torch.float32 if autocast else torch.bfloat16, shaped=True)
    exact = in_float64(case)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        losses = [loss_in_forward(case, objective, chunk_size=8), loss_of_reference(case, objective)]
    truth = gradients(exact, loss_of_reference(exact, objective))
    for i, (one, two, three) in enumerate(zip(*(gradients(case, loss) for loss in losses), truth, strict=True)):
        assert_no_worse(one, two, three, i)


@pytest.mark.parametrize("autocast", [False, True])
def test_backward_keeps_the_precision_of_forward(autocast: bool):
    """Whether or not autocast is on while backward runs."""
    case = wide_case(torch.float32, shaped=True)
    slopes = []
    for during_backward in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = weighted(as_dict(case.fused(chunk_size=8)), DIFFERENTIABLE)
        with torch.autocast("cpu", torch.bfloat16, enabled=during_backward):
            slopes.append(gradients(case, loss))
    for one, two in zip(*slopes, strict=True):
        assert torch.equal(one, two)


def test_small_gradients_of_many_chunks_add_up_in_float32():
    """A bfloat16 sum of equal parts stops growing at 256 of them: chunks of bfloat16 heads must not add up so."""
    mask = torch.zeros(1, 1, 602, dtype=torch.bool)
    mask[:, :, :600] = True
    case = make_case(heads="A", mask=mask, dtype=torch.bfloat16)
    alike = replace(
        case,
        hidden=case.hidden[:, :, :1].detach().expand(1, 1, 602, -1).clone().requires_grad_(),
        target_hidden=normal(1, 1, case.target_hidden.shape[-1], seed=6, dtype=torch.bfloat16).expand(1, 602, -1),
    )
    one_chunk, many = (gradients(alike, alike.fused(chunk_size=size).kl.sum())[1] for size in (600, 1))
    assert_close(many.float(), one_chunk.float(), 1e-2)
