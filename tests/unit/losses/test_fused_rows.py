"""The fast row functions where they differ from the definition: blocks, maxima of maxima, rows far or near."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from fused_cases import (
    DIFFERENTIABLE,
    FULL,
    TRUNCATED,
    Case,
    V,
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

from lkspec.losses.fused import chunks, logits
from lkspec.losses.fused.chunks import chunk_rows
from lkspec.losses.fused.logits import _largest
from lkspec.losses.fused.torch_rows import EXACT_BELOW
from lkspec.losses.objectives import LKAlpha, LKLambda, reduce_loss
from lkspec.types import LinearHead
from lkspec.vocab import DraftVocab

WIDE = 300  # more than a piece of ``_largest``, and no multiple of it
both_vocabularies = pytest.mark.parametrize("vocab", [TRUNCATED, FULL], ids=["truncated", "full"])


@settings(deadline=None, max_examples=60)
@given(width=st.integers(1, 400), distinct=st.integers(1, 50), seed=st.integers(0, 99))
def test_largest_is_the_first_maximum(width: int, distinct: int, seed: int):
    values = torch.randint(0, distinct, (3, width), generator=torch.Generator().manual_seed(seed)).float()
    peak, best = _largest(values)
    assert peak.tolist() == values.amax(-1).tolist()
    assert best.tolist() == [row.index(max(row)) for row in values.tolist()]


@pytest.mark.parametrize("vocab", [DraftVocab(torch.arange(WIDE) * 2, 2 * WIDE), DraftVocab.full(WIDE)])
def test_rows_of_many_blocks(vocab: DraftVocab, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(logits, "_BLOCK_BYTES", 1)
    case = make_case(vocab=vocab, heads="ABA", shaped=True, mask=masks()["holes"])
    assert max(block.stop - block.start for block in logits.blocks(torch.empty(9, WIDE))) == 4
    assert_equals_reference(case, chunk_size=None)


@pytest.mark.parametrize("shaped", [False, True], ids=["plain", "scale_bias_cap"])
@pytest.mark.parametrize("ids", [[0, 2, 3, 5, 8, 9], [9, 10], [1, 7]], ids=str)
def test_a_target_read_in_many_pieces(ids: list[int], shaped: bool, monkeypatch: pytest.MonkeyPatch):
    """Pieces with several tokens of the draft vocabulary, and with none."""
    monkeypatch.setattr(logits, "_PIECE_BYTES", 1)
    monkeypatch.setattr(logits, "_PIECE_COLUMNS", 3)
    assert_equals_reference(make_case(vocab=DraftVocab(torch.tensor(ids), V), heads="ABA", shaped=shaped))


@pytest.mark.parametrize("heads", ["AAA", "AAB", "ABA", "ABC"])
@pytest.mark.parametrize("shaped", [False, True], ids=["plain", "scale_bias_cap"])
def test_products_over_several_depths(shaped: bool, heads: str, monkeypatch: pytest.MonkeyPatch):
    """As on a GPU, where depths of one head share a product."""
    monkeypatch.setattr(chunks, "products_span_depths", lambda device: True)
    assert_equals_reference(make_case(heads=heads, shaped=shaped, mask=masks()["holes"]))


def far_case(vocab: DraftVocab) -> Case:
    """Rows of alpha on both sides of the switch to the definition."""
    case = make_case(vocab=vocab, dtype=torch.float64, scale=25.0)
    case = replace(case, target_head=LinearHead(25 * case.target_head.weight))
    alpha = case.reference().log_alpha[case.mask].exp()
    assert 0 < (alpha < EXACT_BELOW).sum() < len(alpha)
    return case


@both_vocabularies
def test_rows_far_apart_follow_the_definition(vocab: DraftVocab):
    case = far_case(vocab)
    ours, theirs = as_dict(case.fused(chunk_size=4)), as_dict(case.reference())
    for name in DIFFERENTIABLE:
        assert torch.allclose(ours[name], theirs[name], rtol=1e-10, atol=1e-10), name
    for one, two in zip(gradients(case, weighted(ours)), gradients(case, weighted(theirs)), strict=True):
        assert_close(one, two, 1e-10)


@both_vocabularies
@pytest.mark.parametrize("objective", [LKAlpha(), LKLambda(fixed_lambda=0.25)], ids=repr)
def test_rows_far_apart_in_forward(objective: LKLambda, vocab: DraftVocab):
    case = far_case(vocab)
    value = case.fused(chunk_size=4, in_forward=in_forward(objective, case)).value
    assert value is not None
    expected = objective.values(case.reference(), torch.zeros(3, dtype=torch.float64))
    losses = [reduce_loss(values, case.mask, counts(case)) for values in (value, expected)]
    for one, two in zip(*(gradients(case, loss) for loss in losses), strict=True):
        assert_close(one, two, 1e-10)


def near_case(distance: float, dtype: torch.dtype) -> Case:
    """A draft whose logits differ from the target's by ``distance``."""
    num_rows, size = 24, WIDE
    mask = torch.ones(1, 1, num_rows, dtype=torch.bool)
    mask[:, :, -2:] = False
    target, noise = 3 * normal(num_rows, size, seed=60), distance * normal(num_rows, size, seed=61)
    draft = torch.cat([target[1:], target[:1]]) + noise
    return Case(
        hidden=draft[None, None].float().to(dtype).requires_grad_(),
        heads=[LinearHead(torch.eye(size, dtype=dtype))],
        target_hidden=target[None].float().to(dtype),
        target_head=LinearHead(torch.eye(size, dtype=dtype)),
        vocab=DraftVocab.full(size),
        tokens=torch.zeros(1, num_rows, dtype=torch.int64),
        mask=mask,
    )


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("distance", [1.0, 0.1, 0.01])
def test_distributions_close_together_keep_their_digits(distance: float, name: str):
    """Values and slopes are differences of nearly equal numbers there, and come near float64 as the definition does."""
    case, exact = near_case(distance, torch.float32), near_case(distance, torch.float64)
    ours, theirs, truth = (getattr(s, name) for s in (case.fused(), case.reference(), exact.reference()))
    assert (ours - truth).abs().max() <= 2e-6
    slopes = [gradients(c, v.sum())[0] for c, v in ((case, ours), (case, theirs), (exact, truth))]
    assert (slopes[0] - slopes[2]).norm() <= 3 * (slopes[1] - slopes[2]).norm()


@pytest.mark.parametrize(
    ("num_target", "num_draft", "device", "expected"),
    [
        (32_000, 32_000, "cpu", 262),
        (32_000, 8_000, "cpu", 1024),
        (152_000, 152_000, "cpu", 256),
        (1_000, 1_000, "cpu", 1024),
        (152_000, 32_000, "cuda", 586),
    ],
)
def test_rows_of_a_chunk(num_target: int, num_draft: int, device: str, expected: int):
    assert chunk_rows(DraftVocab(torch.arange(num_draft), num_target), 7, torch.device(device)) == expected
