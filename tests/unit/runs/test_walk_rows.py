"""Rows of the walk along held-out conversations: against a recursion, and through the file."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch

from lkspec.measure.walk import walk_rows
from lkspec.runs.folder import RunFolder
from lkspec.runs.rows import WalkRow
from lkspec.runs.tables import read_rows, write_rows
from lkspec.types import Batch, TokenStats, text_key

K = 3
TURNS = torch.tensor(
    [
        [0, 0, 1, 1, 1, 1, 1, 1, 0, 0, 2, 2, 2, 2, 2, 0],  # one conversation of two turns
        [0, 1, 1, 1, 1, 1, 0, 0, 2, 2, 2, 2, 2, 2, 2, 2],  # two conversations, the second from slot 6 on
    ]
)


@pytest.fixture
def batch() -> Batch:
    segments = torch.ones_like(TURNS)
    segments[0, -1], segments[1, 6:] = 0, 2
    tokens = torch.arange(32).reshape(2, 16)
    return Batch(tokens, torch.zeros_like(tokens), segments, TURNS, (("a",), ("b", "c")))


def random_stats(batch: Batch) -> TokenStats:
    generator = torch.Generator().manual_seed(0)
    mask = batch.depth_mask(K)
    values = [torch.rand(mask.shape, generator=generator, dtype=torch.float64) * mask for _ in range(7)]
    log_alpha = torch.log(0.1 + 0.8 * torch.rand(mask.shape, generator=generator, dtype=torch.float64)) * mask
    names = ("kl", "reverse_kl", "accept_prob", "top1", "hit", "coverage")
    return TokenStats(mask=mask, log_alpha=log_alpha, **dict(zip(names, values, strict=False)))


def expected_counts(accept: np.ndarray, inside: np.ndarray, first: int) -> np.ndarray:
    """(rounds, rounds that accept at least 1, .., k) of one turn, by recursion over anchors."""
    depths = len(accept)

    @functools.cache
    def from_anchor(t: int) -> tuple[float, ...]:
        if t >= accept.shape[1] or not inside[t]:
            return (0.0,) * (depths + 1)
        survive = [1.0, *np.cumprod(accept[:, t])]
        total = np.array(survive)
        for number in range(depths + 1):
            ended = survive[number] - (survive[number + 1] if number < depths else 0.0)
            total = total + ended * np.array(from_anchor(t + number + 1))
        return tuple(total)

    return np.array(from_anchor(first))


def test_rows_hold_the_walk_of_each_conversation_at_every_depth(batch):
    stats = random_stats(batch)
    rows = walk_rows(batch, stats, temperature=0.7, num_depths=K, steps=12)
    assert [(row.conversation, row.depth) for row in rows] == [(name, k) for name in "abc" for k in range(1, K + 1)]
    assert {(row.temperature, row.steps) for row in rows} == {(0.7, 12)}
    where = {"a": (0, [1, 9], slice(0, 15)), "b": (1, [0], slice(0, 6)), "c": (1, [7], slice(6, 16))}
    for row in rows:
        b, anchors, slots = where[row.conversation]
        accept, mask = stats.accept_prob[:, b].numpy(), stats.mask[:, b].numpy()
        counts = sum(expected_counts(accept[: row.depth], mask[row.depth - 1], anchor) for anchor in anchors)
        most = sum(expected_counts(accept, mask[K - 1], anchor) for anchor in anchors)
        assert row.rounds == pytest.approx(counts[0])
        assert row.accepted == pytest.approx(counts[1:].sum())
        assert row.at_least == pytest.approx(most[row.depth])
        counted = mask[row.depth - 1, slots]
        assert row.num_tokens == counted.sum()
        assert row.alpha == pytest.approx(np.exp(stats.log_alpha[row.depth - 1, b, slots].numpy())[counted].sum())
        assert row.key == text_key(batch.tokens[b, slots])


def test_added_rows_replace_those_of_the_same_setting(tmp_path):
    run = RunFolder(tmp_path)
    first = [WalkRow("a", "ab", 1.0, 5, k, 1.0, 7, 3.0, 2.5, 0.1, 0.2) for k in (1, 2)]
    run.add_walk(first)
    new = [replace(first[1], **change) for change in ({"temperature": 0.5}, {"key": "cd"}, {"sharpness": 2.0})]
    run.add_walk([replace(first[1], alpha=4.0), *new])
    table = run.read_walk_table()
    assert table is not None
    assert [WalkRow(**row) for row in table.to_pylist()] == [first[0], replace(first[1], alpha=4.0), *new]


def test_rows_come_back_from_the_file(tmp_path):
    rows = [WalkRow("ü", "ab", 1.0, 5, k, 1.0, 7, 1 / 3, 2.5, 0.1, 0.2) for k in (1, 2)]
    write_rows(tmp_path / "walk.parquet", WalkRow, rows)
    assert read_rows(tmp_path / "walk.parquet", WalkRow) == rows
    write_rows(tmp_path / "walk.parquet", WalkRow, rows[:1])
    assert read_rows(tmp_path / "walk.parquet", WalkRow) == rows[:1]
