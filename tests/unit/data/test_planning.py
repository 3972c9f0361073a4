from __future__ import annotations

from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lkspec.data.planning import pack_rows, plan_batches, plan_evaluation

lengths_lists = st.lists(st.integers(1, 200), min_size=1, max_size=60)


def members(batches):
    return sorted(chain.from_iterable(chain.from_iterable(batches)))


@given(lengths=lengths_lists, max_tokens=st.integers(200, 700), seed=st.integers(0, 3), pack=st.booleans())
def test_every_epoch_holds_each_conversation_once_within_the_area(lengths, max_tokens, seed, pack):
    counts = set()
    for epoch in range(3):
        batches = plan_batches(
            lengths, max_tokens=max_tokens, seed=seed, epoch=epoch, packed_length=200 if pack else None
        )
        assert members(batches) == list(range(len(lengths)))
        for batch in batches:
            widths = [sum(lengths[index] for index in row) for row in batch]
            assert len(widths) * max(widths) <= max_tokens
            assert pack or all(len(row) == 1 for row in batch)
            assert not pack or max(widths) <= 200
        counts.add(len(batches))
    assert len(counts) == 1  # schedules rely on it


@given(lengths=lengths_lists, seed=st.integers(0, 3), epoch=st.integers(0, 3), pack=st.booleans())
def test_the_plan_is_a_function_of_seed_and_epoch(lengths, seed, epoch, pack):
    packed_length = 200 if pack else None
    plans = [
        plan_batches(lengths, max_tokens=400, seed=seed, epoch=epoch, packed_length=packed_length) for _ in range(2)
    ]
    assert plans[0] == plans[1]


@pytest.mark.parametrize("pack", [False, True])
def test_order_and_company_change_with_the_epoch_and_the_seed(pack):
    lengths = [40 + i % 3 for i in range(64)]
    plans = [
        plan_batches(lengths, max_tokens=200, seed=seed, epoch=epoch, packed_length=90 if pack else None)
        for seed, epoch in [(0, 0), (0, 1), (1, 0)]
    ]
    company = [{frozenset(chain.from_iterable(batch)) for batch in plan} for plan in plans]
    assert company[0] != company[1]
    assert company[0] != company[2]


def test_similar_lengths_meet_so_that_little_is_padded():
    lengths = [10, 1000] * 50
    batches = plan_batches(lengths, max_tokens=4000, seed=0, epoch=0)
    padded = sum(len(batch) * max(lengths[row[0]] for row in batch) for batch in batches)
    assert padded <= 1.1 * sum(lengths)


def test_the_number_of_batches_does_not_depend_on_who_meets_whom():
    # 19 rows of 68 fit, or 20 of 65: were batches cut by their own lengths, 191 conversations would make 10 or 11.
    lengths = [65 + i % 4 for i in range(191)]
    plans = [plan_batches(lengths, max_tokens=1300, seed=0, epoch=epoch) for epoch in range(20)]
    assert {len(plan) for plan in plans} == {11}
    assert all(len(batch) * max(lengths[row[0]] for row in batch) <= 1300 for plan in plans for batch in plan)


def test_a_conversation_that_just_fits_is_alone():
    assert sorted(plan_batches([97, 97], max_tokens=97, seed=0, epoch=0)) == [[(0,)], [(1,)]]


@given(lengths=lengths_lists)
def test_packing_is_never_worse_than_first_fit_needs_to_be(lengths):
    """Any-fit packing leaves at most one row half empty, so fewer than 2 * total / capacity + 1 rows."""
    rows = pack_rows(lengths, max_length=200)
    assert sorted(chain.from_iterable(rows)) == list(range(len(lengths)))
    fills = sorted(sum(lengths[index] for index in row) for row in rows)
    assert max(fills) <= 200
    assert sum(fill <= 100 for fill in fills) <= 1


def test_packing_by_hand():
    # 7 opens a row, 6 another, 4 fits beside 6 exactly, 3 beside 7, 2 opens a third.
    assert pack_rows([3, 7, 2, 6, 4], max_length=10) == [(1, 0), (3, 4), (2,)]


@given(lengths=lengths_lists, num_replicas=st.integers(1, 5), every=st.integers(1, 3))
def test_evaluation_sees_every_chosen_conversation_once_over_ranks_of_equal_length(lengths, num_replicas, every):
    chosen = list(range(0, len(lengths), every))
    plans = [
        plan_evaluation(lengths, chosen, max_tokens=300, num_replicas=num_replicas, rank=rank)
        for rank in range(num_replicas)
    ]
    assert len({len(plan) for plan in plans}) == 1
    steps = list(chain.from_iterable(plans))
    assert all(len(step) == 1 for step in steps)
    batches = [step[0] for step in steps]
    assert members(batches) == chosen
    for batch in batches:
        assert len(batch) * max(sum(lengths[index] for index in row) for row in batch) <= 300
    assert sum(batch == [()] for batch in batches) < num_replicas
