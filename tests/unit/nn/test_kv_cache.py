from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lkspec.nn.kv_cache import PositionCache

HEADS, WIDTH = 2, 3


def entries(rows: list[list[float]]) -> Tensor:
    """Keys [B, N, S, E] that carry one number a token."""
    return torch.tensor(rows)[:, None, :, None].expand(-1, HEADS, -1, WIDTH).clone()


def write(cache: PositionCache, positions: list[list[int]], numbers: list[list[float]], layer: int = 0) -> Tensor:
    """Writes numbers at positions; what the layer's keys then show, [B, L]."""
    cache.at(torch.tensor(positions))
    keys, values = cache.update(entries(numbers), entries([[-n for n in row] for row in numbers]), layer)
    assert values.equal(-keys)
    assert keys.shape == (cache.num_rows, HEADS, cache.limit, WIDTH)
    assert keys.equal(keys[:, :1, :, :1].expand_as(keys))
    return keys[:, 0, :, 0]


positions_strategy = st.integers(1, 4).flatmap(
    lambda size: st.lists(st.lists(st.integers(0, 40), min_size=size, max_size=size), min_size=1, max_size=3)
)


@given(positions=positions_strategy, window=st.none() | st.integers(1, 12))
def test_mask_shows_earlier_slots_within_the_window(positions, window):
    cache = PositionCache(len(positions))
    cache.at(torch.tensor(positions))
    mask = cache.mask(window)
    limit = max(max(row) for row in positions) + 1
    assert mask.shape == (len(positions), 1, len(positions[0]), limit)
    for row, queries in enumerate(positions):
        for i, query in enumerate(queries):
            for slot in range(limit):
                expected = slot <= query and (window is None or query - slot < window)
                assert bool(mask[row, 0, i, slot]) == expected


def test_slot_is_position():
    cache = PositionCache(2)
    shown = write(cache, [[0, 1], [3, 4]], [[10.0, 11.0], [13.0, 14.0]])
    assert shown.tolist() == [[10, 11, 0, 0, 0], [0, 0, 0, 13, 14]]
    assert cache.limit == cache.get_seq_length() == 5


def test_writing_a_position_again_overwrites_it():
    cache = PositionCache(1)
    write(cache, [[0, 1, 2, 3]], [[1.0, 2.0, 3.0, 4.0]])
    shown = write(cache, [[2]], [[9.0]])
    assert shown.tolist() == [[1, 2, 9]]  # slot 3 is out of sight until it is written again
    assert write(cache, [[3, 4]], [[8.0, 7.0]]).tolist() == [[1, 2, 9, 8, 7]]


def test_growing_keeps_what_was_written():
    cache = PositionCache(1)
    for position in range(300):
        shown = write(cache, [[position]], [[float(position)]])
    assert shown.tolist() == [list(range(300))]


def test_layers_are_separate():
    cache = PositionCache(1)
    write(cache, [[0]], [[1.0]], layer=0)
    write(cache, [[0]], [[2.0]], layer=2)
    assert write(cache, [[1]], [[3.0]], layer=0).tolist() == [[1, 3]]
    assert write(cache, [[1]], [[4.0]], layer=2).tolist() == [[2, 4]]


@pytest.mark.parametrize("length", [2, 200])  # 200 is more than the receiving rows have room for
def test_copied_rows(length):
    source, cache = PositionCache(2), PositionCache(3)
    numbers = [float(n) for n in range(length)]
    write(source, [list(range(length))] * 2, [numbers, [n + 1000 for n in numbers]])
    write(cache, [[0, 1, 2]] * 3, [[5.0, 6.0, 7.0], [8.0, 9.0, 10.0], [11.0, 12.0, 13.0]])
    cache.copy_rows(torch.tensor([2, 0]), source, length)
    shown = write(cache, [[length], [3], [length]], [[-1.0], [-2.0], [-3.0]])
    assert shown[0, : length + 1].tolist() == [*(n + 1000 for n in numbers), -1]
    assert shown[1, :4].tolist() == [8, 9, 10, -2]  # the other row is as it was
    assert shown[2, : length + 1].tolist() == [*numbers, -3]


def test_only_the_first_slots_are_copied():
    source, cache = PositionCache(1), PositionCache(2)
    write(cache, [[0, 1, 2]] * 2, [[5.0, 6.0, 7.0], [8.0, 9.0, 10.0]])
    write(source, [[0, 1, 2]], [[1.0, 2.0, 3.0]])
    cache.copy_rows(torch.tensor([1]), source, 2)
    assert write(cache, [[3]] * 2, [[4.0], [4.0]]).tolist() == [[5, 6, 7, 4], [1, 2, 10, 4]]


def test_copied_rows_are_no_views():
    source, cache = PositionCache(1), PositionCache(1)
    write(source, [[0]], [[1.0]])
    cache.copy_rows(torch.tensor([0]), source, 1)
    write(source, [[0]], [[2.0]])
    assert write(cache, [[1]], [[3.0]]).tolist() == [[1, 3]]


def test_kept_rows_in_the_order_given():
    cache = PositionCache(3)
    write(cache, [[0]] * 3, [[1.0], [2.0], [3.0]])
    cache.keep([2, 0])
    assert cache.num_rows == 2
    assert write(cache, [[1]] * 2, [[4.0], [5.0]]).tolist() == [[3, 4], [1, 5]]


def test_kept_rows_when_the_last_one_fills_a_gap():
    cache = PositionCache(4)
    write(cache, [[0]] * 4, [[1.0], [2.0], [3.0], [4.0]])
    cache.keep([0, 3, 2])
    assert write(cache, [[1]] * 3, [[5.0], [6.0], [7.0]]).tolist() == [[1, 5], [4, 6], [3, 7]]
    cache.keep([0, 1])
    cache.keep([1])
    assert write(cache, [[300]], [[8.0]])[0, [0, 1, 300]].tolist() == [4, 6, 8]  # grown after rows went


def test_kept_rows_when_the_last_ones_fill_several_gaps():
    cache = PositionCache(6)
    write(cache, [[0]] * 6, [[float(row)] for row in range(6)])
    cache.keep([4, 1, 5])
    assert write(cache, [[1]] * 3, [[9.0]] * 3).tolist() == [[4, 9], [1, 9], [5, 9]]


def test_empty_caches_keep_rows_too():
    cache = PositionCache(3)
    cache.keep([2, 1])
    assert cache.num_rows == 2


@given(rows=st.lists(st.integers(0, 4), min_size=1, max_size=5, unique=True))
def test_any_rows_can_be_kept_in_any_order(rows):
    cache = PositionCache(5)
    write(cache, [[0]] * 5, [[float(row)] for row in range(5)])
    cache.keep(rows)
    assert write(cache, [[1]] * len(rows), [[9.0]] * len(rows)).tolist() == [[row, 9] for row in rows]


def test_positions_come_first():
    cache = PositionCache(1)
    with pytest.raises(AssertionError, match="call at"):
        cache.update(entries([[1.0]]), entries([[1.0]]), 0)
    with pytest.raises(AssertionError, match="call at"):
        cache.mask()
    cache.at(torch.zeros(1, 1, dtype=torch.long))
    cache.keep([0])
    with pytest.raises(AssertionError, match="call at"):
        cache.mask()
