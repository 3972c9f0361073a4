"""Top-k and top-p on p: against what decoding samples from, and through both forms of the statistics."""

from __future__ import annotations

import pytest
import torch
from fused_cases import (
    FULL,
    NAMES,
    TRUNCATED,
    as_dict,
    assert_close,
    gradients,
    make_case,
    masks,
    normal,
    weighted,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_stats import naive_stats

from lkspec.decoding.sampling import distribution
from lkspec.losses.divergences import logit_stats
from lkspec.losses.target_filter import TargetFilter
from lkspec.vocab import DraftVocab

FILTERS = [(3, 1.0), (0, 0.7), (5, 0.8), (1, 1.0)]


@settings(deadline=None, max_examples=60)
@given(top_k=st.integers(0, 12), top_p=st.sampled_from([0.05, 0.3, 0.9, 1.0]), seed=st.integers(0, 99))
def test_keeps_what_decoding_samples_from(top_k: int, top_p: float, seed: int):
    logits = 2 * normal(4, 10, seed=seed, dtype=torch.float64)
    expected = distribution(logits, temperature=1.0, top_k=top_k, top_p=top_p)
    assert torch.allclose(TargetFilter(top_k, top_p)(logits).softmax(-1), expected, atol=1e-12)


def test_ties_with_the_last_token_are_kept():
    logits = torch.tensor([1.0, 3.0, 2.0, 2.0, 0.0])
    assert TargetFilter(top_k=2)(logits).isneginf().tolist() == [True, False, False, False, True]
    assert TargetFilter(top_p=0.6)(logits).isneginf().tolist() == [True, False, False, False, True]


def test_one_token_always_stays_and_minus_infinity_never_does():
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf, -torch.inf])
    for kept in (TargetFilter(top_k=3)(logits), TargetFilter(top_p=0.01)(logits), TargetFilter(top_k=9)(logits)):
        assert kept.tolist() == logits.tolist()


@pytest.mark.parametrize(("top_k", "top_p"), FILTERS)
@pytest.mark.parametrize("vocab", [DraftVocab(torch.tensor([1, 2, 4, 7, 8]), 10), DraftVocab.full(10)])
def test_statistics_of_rows(vocab: DraftVocab, top_k: int, top_p: float):
    """Against naive formulas on the logarithm of decoding's own p, tempered before it is filtered."""
    z_q, z_p = 2 * normal(8, vocab.size, seed=0, dtype=torch.float64), 2 * normal(8, 10, seed=1, dtype=torch.float64)
    tokens, temperature = torch.arange(8), 0.6
    stats = logit_stats(z_q, z_p, tokens, vocab, temperature=temperature, top_k=top_k, top_p=top_p)
    p = distribution(z_p, temperature=temperature, top_k=top_k, top_p=top_p)
    covered = p[:, vocab.ids].sum(-1) > 0
    assert covered.any()
    for row in covered.nonzero().squeeze(1).tolist():
        expected = naive_stats(z_q[row] / temperature, p[row].log(), int(tokens[row]), vocab)
        for name in {"kl", "log_alpha", "coverage", "top1", "hit"}:
            assert stats[name][row].item() == pytest.approx(expected[name].item(), abs=1e-10), name
    assert not stats["coverage"][~covered].any()


@pytest.mark.parametrize(("top_k", "top_p"), FILTERS)
@pytest.mark.parametrize("vocab", [TRUNCATED, FULL], ids=["truncated", "full"])
def test_fused_equals_reference(vocab: DraftVocab, top_k: int, top_p: float):
    case = make_case(vocab=vocab, heads="ABA", shaped=True, mask=masks()["holes"])
    options = {"temperature": 0.8, "top_k": top_k, "top_p": top_p}
    ours, theirs = as_dict(case.fused(chunk_size=4, **options)), as_dict(case.reference(**options))
    for name in NAMES:
        # reverse_kl against p~ = 0 counts LOG_ZERO times q's mass there.
        assert torch.allclose(ours[name], theirs[name], rtol=1e-5, atol=1e-5), name
    for one, two in zip(*(gradients(case, weighted(stats)) for stats in (ours, theirs)), strict=True):
        assert_close(one, two, 1e-5)
    assert not torch.allclose(ours["log_alpha"], case.fused().log_alpha)


def test_refuses_what_is_out_of_range():
    with pytest.raises(ValueError, match="top_k"):
        TargetFilter(top_k=-1)
    for top_p in (0.0, 1.1, float("nan")):
        with pytest.raises(ValueError, match="top_p"):
            TargetFilter(top_p=top_p)
