"""The walk against every outcome of its coins, one by one."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lkspec.decoding.walk import WalkCount, walk_turn, walk_turns
from lkspec.types import Batch


def literal_walk(coins: np.ndarray, last_anchor: int, first: int) -> tuple[int, list[int]]:
    """Rounds of one outcome: (how many, accepted tokens of each); anchors past ``last_anchor`` hold no whole round."""
    accepted = []
    anchor = first
    while anchor <= last_anchor:
        count = 0
        while count < len(coins) and coins[count, anchor]:
            count += 1
        accepted.append(count)
        anchor += count + 1
    return len(accepted), accepted


def enumerated_walk(accept: np.ndarray, last_anchor: int, first: int) -> WalkCount:
    """The expectation over all 2^(K T) outcomes."""
    num_depths, num_slots = accept.shape
    rounds, at_least = 0.0, np.zeros(num_depths)
    for outcome in itertools.product((0, 1), repeat=num_depths * num_slots):
        coins = np.array(outcome).reshape(num_depths, num_slots)
        weight = float(np.where(coins == 1, accept, 1 - accept).prod())
        if weight > 0:
            count, accepted = literal_walk(coins, last_anchor, first)
            rounds += weight * count
            at_least += [weight * sum(a >= k for a in accepted) for k in range(1, num_depths + 1)]
    return WalkCount(rounds=rounds, accepted=float(at_least.sum()), accepted_at_least=tuple(at_least))


def up_to(last_anchor: int, num_slots: int) -> np.ndarray:
    return np.arange(num_slots) <= last_anchor


def assert_same(got: WalkCount, expected: WalkCount) -> None:
    assert got.rounds == pytest.approx(expected.rounds, abs=1e-12)
    assert got.accepted == pytest.approx(expected.accepted, abs=1e-12)
    assert got.accepted_at_least == pytest.approx(expected.accepted_at_least, abs=1e-12)


@pytest.mark.parametrize(
    ("num_depths", "num_slots", "last_anchor", "first"),
    [(1, 5, 4, 0), (1, 6, 3, 1), (2, 5, 4, 0), (2, 5, 2, 0), (2, 5, 3, 2), (3, 4, 3, 0), (3, 4, 0, 0), (4, 3, 2, 0)],
)
def test_walk_is_the_expectation_over_all_coins(num_depths: int, num_slots: int, last_anchor: int, first: int) -> None:
    accept = np.random.default_rng(num_depths * 10 + num_slots).random((num_depths, num_slots))
    accept[0, ::3] = 1.0
    accept[-1, 1::3] = 0.0
    got = walk_turn(accept, up_to(last_anchor, num_slots), first)
    assert_same(got, enumerated_walk(accept, last_anchor, first))


@given(st.data())
@settings(max_examples=200, deadline=None, derandomize=True)
def test_greedy_walk_is_a_literal_loop(data) -> None:
    """Coins of 0 or 1 leave one outcome: whole numbers, the same as the loop's."""
    num_depths, num_slots = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 30))
    first = data.draw(st.integers(0, num_slots - 1))
    last_anchor = data.draw(st.integers(first, num_slots - 1))
    seed, rate = data.draw(st.integers(0, 10**6)), data.draw(st.sampled_from([0.0, 0.3, 0.8, 1.0]))
    coins = (np.random.default_rng(seed).random((num_depths, num_slots)) < rate).astype(float)
    got = walk_turn(coins, up_to(last_anchor, num_slots), first)
    rounds, accepted = literal_walk(coins, last_anchor, first)
    assert (got.rounds, got.accepted) == (rounds, sum(accepted))
    assert got.accepted_at_least == tuple(sum(a >= k for a in accepted) for k in range(1, num_depths + 1))
    assert got.acceptance_length == 1 + sum(accepted) / rounds


def test_what_lies_past_the_last_whole_round_changes_nothing() -> None:
    rng = np.random.default_rng(0)
    accept = rng.random((3, 12))
    changed = accept.copy()
    changed[:, 9:] = rng.random((3, 3))
    changed[:, :2] = rng.random((3, 2))  # nor what lies before the first anchor
    assert walk_turn(accept, up_to(8, 12), 2) == walk_turn(changed, up_to(8, 12), 2)


@pytest.mark.parametrize(("rate", "tau"), [(0.0, 1.0), (1.0, 5.0)])
def test_constant_rates(rate: float, tau: float) -> None:
    """A draft that is never or always right: tau is 1 or K + 1."""
    count = walk_turn(np.full((4, 40), rate), up_to(35, 40), 0)
    assert count.acceptance_length == pytest.approx(tau)
    assert count.rounds == (36 if rate == 0 else math.ceil(36 / 5))


def test_a_long_text_approaches_the_renewal_value() -> None:
    """Independent coins of rate a: tau = sum_{k=0..K} a^k."""
    a, num_depths = 0.7, 4
    count = walk_turn(np.full((num_depths, 5000), a), up_to(4999, 5000), 0)
    assert count.acceptance_length == pytest.approx(sum(a**k for k in range(num_depths + 1)), rel=1e-3)


def test_no_round_has_no_acceptance_length() -> None:
    count = walk_turn(np.ones((2, 3)), np.zeros(3, dtype=bool), 0)
    assert count.rounds == 0
    assert math.isnan(count.acceptance_length)


# --- turns of a row -----------------------------------------------------------------------------------------------


def row_with_turns(turns: list[int]) -> Batch:
    tokens = torch.arange(len(turns))[None]
    return Batch(tokens, tokens, torch.ones_like(tokens), torch.tensor([turns]), (("a",),))


def test_turns_of_a_row_are_walked_one_by_one() -> None:
    """Turn 1 covers x_3..x_7, turn 2 is too short for a round of K = 2, turn 3 covers x_13..x_16."""
    batch = row_with_turns([0, 0, 0, 1, 1, 1, 1, 1, 0, 0, 2, 2, 0, 3, 3, 3, 3, 0])
    num_depths = 2
    mask = batch.depth_mask(num_depths)[:, 0]
    accept = torch.rand(num_depths, 18, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    counts = walk_turns(accept, mask, batch.turns[0])
    # A round anchored at t proposes x_{t+2} and x_{t+3}: from x_3 as the first token to the last token of the turn.
    expected = [enumerated_walk(accept[:, 2:5].numpy(), 2, 0), enumerated_walk(accept[:, 12:14].numpy(), 1, 0)]
    assert len(counts) == 2
    for got, want in zip(counts, expected, strict=True):
        assert_same(got, want)


def test_a_turn_of_exactly_one_round() -> None:
    """K + 1 tokens: the first one and K proposals."""
    batch = row_with_turns([0, 1, 1, 1, 1, 0])
    counts = walk_turns(torch.full((3, 6), 0.5), batch.depth_mask(3)[:, 0], batch.turns[0])
    assert [(c.rounds, c.accepted) for c in counts] == [(1.0, 0.5 + 0.25 + 0.125)]


def test_a_turn_that_begins_the_row_is_left_out() -> None:
    """Its first token has no anchor before it, so no round of it is known from its start."""
    batch = row_with_turns([1, 1, 1, 1, 1, 0])
    assert walk_turns(torch.ones(2, 6), batch.depth_mask(2)[:, 0], batch.turns[0]) == []
