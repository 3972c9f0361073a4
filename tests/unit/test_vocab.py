from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lkspec.vocab import DraftVocab


@st.composite
def vocabularies(draw) -> DraftVocab:
    size = draw(st.integers(1, 40))
    ids = draw(st.sets(st.integers(0, size - 1), min_size=1))
    return DraftVocab(torch.tensor(sorted(ids)), size)


@given(vocabularies())
def test_ids_go_there_and_back(vocab):
    draft_ids = torch.arange(vocab.size)
    target_ids = vocab.to_target(draft_ids)
    assert target_ids.tolist() == vocab.ids.tolist()
    assert vocab.to_draft(target_ids).equal(draft_ids)
    outside = [i for i in range(vocab.target_size) if i not in vocab.ids.tolist()]
    assert vocab.to_draft(torch.tensor(outside, dtype=torch.long)).tolist() == [-1] * len(outside)
    assert vocab.is_full == (not outside)


@given(vocabularies())
def test_engine_tables(vocab):
    """d2t holds offsets, t2d membership: what vLLM, SGLang and speculators load."""
    assert (torch.arange(vocab.size) + vocab.d2t).equal(vocab.ids)
    assert vocab.t2d.tolist() == [i in vocab.ids.tolist() for i in range(vocab.target_size)]
    assert vocab.t2d.nonzero()[:, 0].equal(vocab.ids)


@given(vocabularies(), st.integers(0, 2**31))
def test_expand_is_the_adjoint_of_restrict(vocab, seed):
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(2, 3, vocab.target_size, generator=generator, dtype=torch.float64)
    narrow = torch.randn(2, 3, vocab.size, generator=generator, dtype=torch.float64)
    assert vocab.restrict(wide).tolist() == wide[..., vocab.ids].tolist()
    assert vocab.restrict(vocab.expand(narrow)).equal(narrow)
    left, right = (vocab.restrict(wide) * narrow).sum(), (wide * vocab.expand(narrow)).sum()
    torch.testing.assert_close(left, right)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.data())
def test_the_most_frequent_tokens_ties_to_the_lower_id(counts, data):
    size = data.draw(st.integers(1, len(counts)))
    keep = data.draw(st.sets(st.integers(0, len(counts) - 1), max_size=size))
    vocab = DraftVocab.from_counts(torch.tensor(counts), size, keep=tuple(keep))
    ranked = sorted(range(len(counts)), key=lambda i: (i not in keep, -counts[i], i))
    assert vocab.ids.tolist() == sorted(ranked[:size])
    assert vocab.target_size == len(counts)
    assert keep <= set(vocab.ids.tolist())


def test_special_tokens_are_kept_though_never_counted():
    vocab = DraftVocab.from_counts(torch.tensor([9, 8, 7, 0, 0]), 3, keep=(4, 3, 4))
    assert vocab.ids.tolist() == [0, 3, 4]


@given(vocabularies(), st.data())
def test_coverage_is_the_share_of_counts_inside(vocab, data):
    counts = data.draw(st.lists(st.integers(0, 9), min_size=vocab.target_size, max_size=vocab.target_size))
    got = vocab.coverage(torch.tensor(counts))
    if sum(counts) == 0:
        assert math.isnan(got)
    else:
        assert got == sum(counts[i] for i in vocab.ids.tolist()) / sum(counts)


def test_full_vocabulary_changes_nothing():
    vocab = DraftVocab.full(5)
    values = torch.randn(2, 5)
    assert vocab.is_full
    assert vocab.restrict(values) is values
    assert vocab.expand(values) is values
    assert vocab.d2t.tolist() == [0] * 5


def test_ids_are_saved_and_the_rest_is_derived():
    assert list(DraftVocab(torch.tensor([1, 3]), 4).state_dict()) == ["ids"]


@pytest.mark.parametrize("ids", [[], [2, 1], [1, 1], [[0, 1]]])
def test_lists_that_are_no_vocabulary_are_refused(ids):
    with pytest.raises(ValueError, match="strictly ascending"):
        DraftVocab(torch.tensor(ids), 4)


@pytest.mark.parametrize("ids", [[-1, 2], [0, 4]])
def test_ids_outside_the_target_are_refused(ids):
    with pytest.raises(ValueError, match=r"must lie in \[0, 4\)"):
        DraftVocab(torch.tensor(ids), 4)


@pytest.mark.parametrize(("size", "keep"), [(0, ()), (6, ()), (1, (0, 4)), (-1, ())])
def test_impossible_sizes_are_refused(size, keep):
    with pytest.raises(ValueError, match=rf"always kept and the target's 5, got {size}"):
        DraftVocab.from_counts(torch.ones(5, dtype=torch.long), size, keep=keep)
