from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lkspec.data.chat import Encoded
from lkspec.data.dataset import collate
from lkspec.drafts.base import UnrollOptions
from lkspec.drafts.layers import visible_anchors
from lkspec.types import Batch, FreshStates, HeadSummary, LinearHead, TargetStates, stack_rows


def batch_of_turns(turns: list[list[int]]) -> Batch:
    numbers = torch.tensor(turns)
    return Batch(numbers, numbers, numbers, numbers, tuple(("a",) for _ in turns))


turn_rows = st.integers(1, 12).flatmap(
    lambda length: st.lists(st.lists(st.integers(0, 3), min_size=length, max_size=length), min_size=1, max_size=3)
)


@given(turn_rows, st.integers(1, 6))
def test_depth_mask_against_contract_1(turns, num_depths):
    """mask[k, b, t] = 1 iff x_{t+1} .. x_{t+1+k} all belong to the same assistant turn."""
    mask = batch_of_turns(turns).depth_mask(num_depths)
    length = len(turns[0])
    assert mask.shape == (num_depths, len(turns), length)
    for depth in range(1, num_depths + 1):
        for row, numbers in enumerate(turns):
            for anchor in range(length):
                span = numbers[anchor + 1 : anchor + 1 + depth + 1]
                whole = len(span) == depth + 1
                assert bool(mask[depth - 1, row, anchor]) == (whole and span[0] > 0 and len(set(span)) == 1)


@given(turn_rows)
def test_supervised_tokens_are_those_of_turns(turns):
    assert batch_of_turns(turns).num_supervised == sum(turn > 0 for row in turns for turn in row)


def test_packed_means_more_than_one_conversation_in_a_row():
    one = torch.zeros(2, 3, dtype=torch.long)
    assert not Batch(one, one, one, one, (("a",), ("b",))).is_packed
    assert Batch(one, one, one, one, (("a",), ("b", "c"))).is_packed


def test_every_tensor_moves():
    one = torch.zeros(1, 3, dtype=torch.long)
    moved = Batch(one, one, one, one, (("a",),)).to("meta")
    assert all(getattr(moved, name).is_meta for name in ("tokens", "positions", "segments", "turns"))
    assert moved.ids == (("a",),)
    states = TargetStates(torch.zeros(1, 3, 4), torch.zeros(1, 3, 2), HeadSummary(torch.zeros(1, 3), one))
    fresh = FreshStates(one, one, states, torch.ones(1)).to("meta")
    assert fresh.lengths.is_meta
    assert all(tensor.is_meta for tensor in fresh.states.tensors())
    assert len(fresh.states.tensors()) == 4
    head = LinearHead(torch.zeros(2, 2), torch.zeros(2), 0.5, 3.0).to("meta")
    assert head.weight.is_meta
    assert (head.scale, head.soft_cap) == (0.5, 3.0)


@pytest.mark.parametrize("bias", [None, [0.5, -1.0, 2.0]])
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("soft_cap", [None, 2.0])
def test_logits_of_a_described_head(bias, scale, soft_cap):
    hidden, rows = [1.5, -2.0], [[1.0, 0.0], [2.0, 3.0], [-1.0, 1.0]]
    tensor_bias = None if bias is None else torch.tensor(bias, dtype=torch.float64)
    head = LinearHead(torch.tensor(rows, dtype=torch.float64), tensor_bias, scale, soft_cap)
    got = head.logits(torch.tensor([[hidden]], dtype=torch.float64))
    expected = [
        scale * (row[0] * hidden[0] + row[1] * hidden[1]) + (bias[i] if bias else 0) for i, row in enumerate(rows)
    ]
    if soft_cap is not None:
        expected = [soft_cap * math.tanh(value / soft_cap) for value in expected]
    assert got[0, 0].tolist() == pytest.approx(expected, rel=1e-12)
    sharp = head.sharpened(1.7).logits(torch.tensor([[hidden]], dtype=torch.float64))
    assert sharp[0, 0].tolist() == pytest.approx([1.7 * value for value in expected], rel=1e-12)
    assert head.sharpened(1.0) is head


def test_rows_are_stacked_with_zeros_behind():
    assert stack_rows([torch.tensor([1, 2, 3]), torch.tensor([4])]).tolist() == [[1, 2, 3], [4, 0, 0]]


def test_a_moved_batch_is_read_where_it_was_made():
    """A step that asks its device which conversations it holds would wait for all that is queued there."""
    batch = collate([[encoded("a", 5)], [encoded("b", 3), encoded("c", 4)]])
    moved = batch.to("meta")
    assert moved.tokens.is_meta
    assert moved.as_made is moved.to("meta").as_made is batch.as_made is batch
    assert [one.key for one in moved.conversations()] == [one.key for one in batch.conversations()]
    assert visible_anchors(moved, UnrollOptions()).spans == visible_anchors(batch, UnrollOptions()).spans


def encoded(name: str, length: int) -> Encoded:
    return Encoded(name, list(range(length)), [0] + [1] * (length - 1), 1.0)
