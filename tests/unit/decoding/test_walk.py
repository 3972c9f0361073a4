"""The walk: its scalar form against every outcome of its coins, and the walk of many turns at once against that."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lkspec.decoding.walk import TurnWalks, WalkCount, walk_turns
from lkspec.measure.walk import walk_rows
from lkspec.types import Batch, TokenStats


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


def scalar_walk(accept: np.ndarray, last_anchor: int, first: int) -> WalkCount:
    """The expectation in closed form: anchor by anchor, the probability of a round there flows along the text."""
    num_depths = len(accept)
    visit = np.zeros(last_anchor + num_depths + 2)
    visit[first] = 1.0
    at_least, rounds = np.zeros(num_depths), 0.0
    for anchor in range(first, last_anchor + 1):
        survive = np.cumprod(accept[:, anchor])  # P(accepted >= k), k = 1..K
        rounds += visit[anchor]
        at_least += visit[anchor] * survive
        # P(accepted = a) for a = 0..K moves the anchor a + 1 further.
        visit[anchor + 1 : anchor + num_depths + 2] += visit[anchor] * -np.diff(survive, prepend=1.0, append=0.0)
    return WalkCount(rounds=rounds, accepted=float(at_least.sum()), accepted_at_least=tuple(at_least))


def scalar_walks(accept: Tensor, mask: Tensor, turns: Tensor) -> list[WalkCount]:
    """The walk along each turn of a row; accept and mask are [k, T], and turns without a whole round are left out."""
    found = []
    for number in turns[turns > 0].unique().tolist():
        first = turns.tolist().index(number) - 1
        if first >= 0 and mask[-1, first]:
            last_anchor = first
            while last_anchor + 1 < len(turns) and mask[-1, last_anchor + 1]:
                last_anchor += 1
            found.append(scalar_walk(accept.double().numpy(), last_anchor, first))
    return found


def walk_row(accept: np.ndarray, turns: list[int]) -> TurnWalks:
    """The walk of a batch of one row."""
    return walk_turns(torch.from_numpy(accept)[:, None], torch.tensor([turns]))


def one_turn(accept: np.ndarray, last_anchor: int, first: int) -> WalkCount:
    """The walk along the turn whose last whole round of K is anchored at ``last_anchor``."""
    num_depths = len(accept)
    turns = [0] * (first + 1) + [1] * (last_anchor - first + 1 + num_depths)
    padded = np.zeros((num_depths, len(turns)))
    padded[:, : accept.shape[1]] = accept[:, : len(turns)]
    return walk_row(padded, turns).count(0, num_depths)


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
    expected = enumerated_walk(accept, last_anchor, first)
    assert_same(scalar_walk(accept, last_anchor, first), expected)
    assert_same(one_turn(accept, last_anchor, first), expected)


@given(st.data())
@settings(max_examples=200, deadline=None, derandomize=True)
def test_greedy_walk_is_a_literal_loop(data) -> None:
    """Coins of 0 or 1 leave one outcome: whole numbers, the same as the loop's."""
    num_depths, num_slots = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 30))
    first = data.draw(st.integers(0, num_slots - 1))
    last_anchor = data.draw(st.integers(first, num_slots - 1))
    seed, rate = data.draw(st.integers(0, 10**6)), data.draw(st.sampled_from([0.0, 0.3, 0.8, 1.0]))
    coins = (np.random.default_rng(seed).random((num_depths, num_slots)) < rate).astype(float)
    got = one_turn(coins, last_anchor, first)
    rounds, accepted = literal_walk(coins, last_anchor, first)
    assert (got.rounds, got.accepted) == (rounds, sum(accepted))
    assert got.accepted_at_least == tuple(sum(a >= k for a in accepted) for k in range(1, num_depths + 1))


def test_what_lies_past_the_last_whole_round_changes_nothing() -> None:
    rng = np.random.default_rng(0)
    accept = rng.random((3, 12))
    changed = accept.copy()
    changed[:, 9:] = rng.random((3, 3))
    changed[:, :2] = rng.random((3, 2))  # nor what lies before the first anchor
    assert one_turn(accept, 8, 2) == one_turn(changed, 8, 2)


@pytest.mark.parametrize(("rate", "tau"), [(0.0, 1.0), (1.0, 5.0)])
def test_constant_rates(rate: float, tau: float) -> None:
    """A draft that is never or always right: tau is 1 or K + 1."""
    count = one_turn(np.full((4, 40), rate), 35, 0)
    assert 1 + count.accepted / count.rounds == pytest.approx(tau)
    assert count.rounds == (36 if rate == 0 else math.ceil(36 / 5))


def test_a_long_text_approaches_the_renewal_value() -> None:
    """Independent coins of rate a: tau = sum_{k=0..K} a^k."""
    a, num_depths = 0.7, 4
    count = one_turn(np.full((num_depths, 5000), a), 4999, 0)
    assert 1 + count.accepted / count.rounds == pytest.approx(sum(a**k for k in range(num_depths + 1)), rel=1e-3)


def test_a_turn_too_short_for_a_whole_round_has_none() -> None:
    count = walk_row(np.ones((2, 3)), [0, 1, 1]).count(0, 2)  # a round of K = 2 needs a turn of 3
    assert (count.rounds, count.accepted) == (0, 0)


# --- many turns ---------------------------------------------------------------------------------------------------


def test_turns_of_a_row_are_walked_one_by_one() -> None:
    """Turn 1 covers x_3..x_7, turn 2 is too short for a round of K = 2, turn 3 covers x_13..x_16."""
    accept = np.random.default_rng(0).random((2, 18))
    walks = walk_row(accept, [0, 0, 0, 1, 1, 1, 1, 1, 0, 0, 2, 2, 0, 3, 3, 3, 3, 0])
    assert (walks.rows.tolist(), walks.begins.tolist()) == ([0, 0, 0], [3, 10, 13])
    # A round anchored at t proposes x_{t+2} and x_{t+3}: from x_3 as the first token to the last token of the turn.
    assert_same(walks.count(0, 2), enumerated_walk(accept[:, 2:5], 2, 0))
    assert walks.count(1, 2) == WalkCount(0.0, 0.0, (0.0, 0.0))
    assert_same(walks.count(1, 1), enumerated_walk(accept[:1, 9:10], 0, 0))
    assert_same(walks.count(2, 2), enumerated_walk(accept[:, 12:14], 1, 0))


def test_a_turn_of_exactly_one_round() -> None:
    """K + 1 tokens: the first one and K proposals."""
    walks = walk_row(np.full((3, 6), 0.5), [0, 1, 1, 1, 1, 0])
    assert (walks.rounds[0, 2], walks.at_least[0, 2].sum()) == (1.0, 0.5 + 0.25 + 0.125)


def test_a_turn_that_begins_the_row_is_left_out() -> None:
    """Its first token has no anchor before it, so no round of it is known from its start."""
    assert walk_row(np.ones((2, 6)), [1, 1, 1, 1, 1, 0]).rounds.shape == (0, 2)
    assert walk_row(np.ones((2, 6)), [0] * 6).at_least.shape == (0, 2, 2)


#: A conversation: (tokens before the turn, tokens of the turn) of each; 0 before: it begins the text or follows a turn.
CONVERSATION = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 12)), min_size=1, max_size=3)


@st.composite
def packed_batches(draw: st.DrawFn) -> Batch:
    """Rows of one or more conversations of one or more turns, too short ones among them, padded on the right."""
    rows = draw(st.lists(st.lists(CONVERSATION, min_size=1, max_size=3), min_size=1, max_size=4))
    width = max(sum(gap + length for turns in row for gap, length in turns) for row in rows) + draw(st.integers(0, 2))
    turns, segments = torch.zeros(2, len(rows), width, dtype=torch.int64)
    for b, row in enumerate(rows):
        slot = number = 0
        for segment, conversation in enumerate(row, start=1):
            for gap, length in conversation:
                number += 1
                segments[b, slot : slot + gap + length] = segment
                turns[b, slot + gap : slot + gap + length] = number
                slot += gap + length
    tokens = torch.arange(turns.numel()).view_as(turns)
    ids = tuple(tuple(f"{b}-{c}" for c in range(len(row))) for b, row in enumerate(rows))
    return Batch(tokens, tokens, segments, turns, ids)


@st.composite
def walkable(draw: st.DrawFn) -> tuple[Batch, Tensor, Tensor]:
    """(batch, a_k [K, B, T], alpha [K, B, T]): nan where the mask is 0, a_k often exactly 0 or 1."""
    batch, num_depths = draw(packed_batches()), draw(st.integers(1, 6))
    mask = batch.depth_mask(num_depths)
    spread = draw(st.sampled_from([0.0, 1.0, 3.0]))  # how many lie past [0, 1] and are cut to 0 or 1
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    accept, alpha = torch.rand(2, *mask.shape, generator=generator, dtype=torch.float64)
    accept = (0.5 + (1 + spread) * (accept - 0.5)).clamp(0, 1)
    return batch, accept.masked_fill(~mask, math.nan), alpha.masked_fill(~mask, math.nan)


@given(walkable(), st.sampled_from([1, 20, 1 << 14]))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_turns_and_depths_walked_at_once_are_those_walked_one_by_one(drawn, group_anchors: int) -> None:
    batch, accept, _ = drawn
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lkspec.decoding.walk._GROUP_ANCHORS", group_anchors)
        walks = walk_turns(accept, batch.turns)
    for depth in range(1, len(accept) + 1):
        mask = batch.depth_mask(depth)
        whole = [turn for turn in range(len(walks.rows)) if walks.rounds[turn, depth - 1] > 0]
        expected = [
            (row, count)
            for row in range(len(batch.turns))
            for count in scalar_walks(accept[:depth, row], mask[:, row], batch.turns[row])
        ]
        assert walks.rows[whole].tolist() == [row for row, _ in expected]
        for turn, (_, count) in zip(whole, expected, strict=True):
            assert_same(walks.count(turn, depth), count)
            assert walks.at_least[turn, depth - 1].sum() == pytest.approx(count.accepted, abs=1e-12)
        assert (walks.at_least[:, depth - 1, depth:] == 0).all()


@given(walkable())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_rows_of_conversations_are_the_sums_over_their_turns(drawn) -> None:
    batch, accept, alpha = drawn
    mask = batch.depth_mask(len(accept))
    zero = torch.zeros_like(accept)
    stats = TokenStats(mask, zero, zero, alpha.log(), accept, zero, zero, zero)
    rows = iter(walk_rows(batch, stats, temperature=1.0, num_depths=len(accept), steps=3))
    for conversation in batch.conversations():
        place = (conversation.row, conversation.slots)
        walks = [
            scalar_walks(accept[:k, *place], mask[:k, *place], conversation.turns) for k in range(1, len(accept) + 1)
        ]
        for depth, counts in enumerate(walks, start=1):
            row = next(rows)
            assert (row.conversation, row.key, row.depth) == (conversation.name, conversation.key, depth)
            assert row.num_tokens == mask[depth - 1, *place].sum()
            assert row.alpha == pytest.approx(float(alpha[depth - 1, *place].nansum()), abs=1e-12)
            assert row.rounds == pytest.approx(sum(count.rounds for count in counts), abs=1e-12)
            assert row.accepted == pytest.approx(sum(count.accepted for count in counts), abs=1e-12)
            expected = sum(count.accepted_at_least[depth - 1] for count in walks[-1])
            assert row.at_least == pytest.approx(expected, abs=1e-12)
    assert next(rows, None) is None
