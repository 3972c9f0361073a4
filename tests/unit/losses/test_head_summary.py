"""What the target's logits come to, and statistics that take it in place of products with the whole head."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from fused_cases import (
    FULL,
    HT,
    TRUNCATED,
    Case,
    as_dict,
    assert_close,
    assert_equals_reference,
    counts,
    gradients,
    in_forward,
    make_case,
    masks,
    normal,
    weighted,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lkspec.losses.divergences import LOG_ZERO
from lkspec.losses.fused.head_summary import head_summary
from lkspec.losses.objectives import JensenShannon, LKAlpha, LKLambda, Objective, reduce_loss
from lkspec.types import HeadSummary, LinearHead
from lkspec.vocab import DraftVocab


@settings(deadline=None, max_examples=30)
@given(rows=st.integers(0, 5), size=st.integers(1, 2500), shaped=st.booleans(), seed=st.integers(0, 99))
def test_it_is_that_of_the_logits(rows: int, size: int, shaped: bool, seed: int):
    """Over one piece of the vocabulary (of 1,024 tokens at least), two or three."""
    head = LinearHead(3 * normal(size, HT, seed=seed))
    if shaped:
        head = replace(head, bias=normal(size, seed=seed + 1), scale=0.7, soft_cap=5.0)
    hidden = normal(2, rows, HT, seed=seed + 2)
    logits = head.logits(hidden).double()
    found = head_summary(head, hidden)
    assert (found.log_normaliser.dtype, found.argmax.dtype) == (torch.float32, torch.int64)
    assert found.log_normaliser.shape == found.argmax.shape == (2, rows)
    assert torch.allclose(found.log_normaliser.double(), logits.exp().sum(-1).log(), atol=1e-5)
    largest = logits.gather(-1, found.argmax[..., None]).squeeze(-1)
    assert torch.allclose(largest, logits.amax(-1), atol=1e-6)


def test_more_rows_than_are_taken_together_and_float64():
    head, hidden = LinearHead(normal(7, HT, seed=1, dtype=torch.float64)), normal(1100, HT, seed=2, dtype=torch.float64)
    found = head_summary(head, hidden)
    assert found.log_normaliser.dtype == torch.float64
    assert torch.allclose(found.log_normaliser, head.logits(hidden).logsumexp(-1), atol=1e-14)
    assert found.argmax.equal(head.logits(hidden).argmax(-1))


@pytest.mark.parametrize("chunk_size", [1, 4, None])
@pytest.mark.parametrize("shaped", [False, True], ids=["plain", "scale_bias_cap"])
@pytest.mark.parametrize("heads", ["AAA", "ABC"])
@pytest.mark.parametrize("vocab", [TRUNCATED, FULL], ids=["truncated", "full"])
def test_statistics_and_gradients_equal_reference(vocab: DraftVocab, heads: str, shaped: bool, chunk_size: int | None):
    case = make_case(vocab=vocab, heads=heads, shaped=shaped, mask=masks()["holes"])
    assert_equals_reference(case, chunk_size=chunk_size, summary=case.summary)


def test_a_single_depth_keeps_no_probabilities():
    case = make_case(heads="A", mask=masks()["whole"][:1])
    assert_equals_reference(case, summary=case.summary)


@pytest.mark.parametrize("objective", [LKAlpha(), LKLambda(), JensenShannon()], ids=repr)
def test_gradients_in_forward(objective: Objective):
    case = make_case(heads="ABA", shaped=True)

    def loss(summary: HeadSummary | None) -> Tensor:
        promised = in_forward(objective, case)
        stats = case.fused(in_forward=promised, row_value=objective.row_value, target_summary=summary)
        assert stats.value is not None
        return reduce_loss(stats.value, case.mask, counts(case))

    ours, theirs = loss(case.summary), loss(None)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    for one, two in zip(gradients(case, ours), gradients(case, theirs), strict=True):
        assert_close(one, two, 1e-5)


def outside_forgotten(case: Case) -> Case:
    """The target's head with NaN for every token that the draft cannot propose."""
    inside = torch.zeros(case.vocab.target_size, dtype=torch.bool)
    inside[case.vocab.ids] = True
    weight = case.target_head.weight.masked_fill(~inside[:, None], torch.nan)
    return replace(case, target_head=replace(case.target_head, weight=weight))


def test_the_rest_of_the_head_is_not_read():
    case = make_case()
    stats = outside_forgotten(case).fused(target_summary=case.summary)
    for name, value in as_dict(stats).items():
        assert torch.allclose(value, getattr(case.reference(), name), atol=1e-5), name
    assert weighted(as_dict(stats)).isfinite()


@pytest.mark.parametrize("options", [{"temperature": 0.7}, {"top_k": 3}, {"top_p": 0.8}], ids=str)
def test_another_distribution_than_the_summarys_is_read_from_the_head(options: dict[str, float]):
    case = make_case()
    wrong = HeadSummary(case.summary.log_normaliser + 1, case.summary.argmax * 0)
    ours, theirs = as_dict(case.fused(target_summary=wrong, **options)), as_dict(case.reference(**options))
    for name, value in ours.items():
        assert torch.allclose(value, theirs[name], atol=1e-5), name


def test_rows_without_mass_in_the_draft_vocabulary():
    case = make_case(shaped=True)
    assert case.target_head.bias is not None
    bias = case.target_head.bias.index_fill(0, case.vocab.ids, -torch.inf)
    case = replace(case, target_head=replace(case.target_head, bias=bias, soft_cap=None))
    stats = case.fused(target_summary=case.summary)
    assert (stats.log_alpha[case.mask] == LOG_ZERO).all()
    assert not stats.coverage.any()
    assert not stats.kl.any()
    for gradient in gradients(case, weighted(as_dict(stats))):
        assert not gradient.any()


def test_coverage_stays_at_most_1_with_a_summary_of_less_precision():
    case = make_case(shaped=True)
    assert case.target_head.bias is not None
    outside = torch.ones(case.vocab.target_size, dtype=torch.bool).index_fill(0, case.vocab.ids, False)
    bias = case.target_head.bias.masked_fill(outside, -30.0)  # nearly all mass is inside
    case = replace(case, target_head=replace(case.target_head, bias=bias, soft_cap=None))
    low = HeadSummary(case.summary.log_normaliser - 0.01, case.summary.argmax)
    stats = case.fused(target_summary=low)
    assert (stats.coverage[case.mask] == 1.0).all()
    assert (stats.log_alpha <= 1e-6).all()
