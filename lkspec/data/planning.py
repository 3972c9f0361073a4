"""Which conversations meet in which micro-batch.

A *row* is the conversations that share one row of a batch (one, unless packed), as indices; a *micro-batch* is a list
of rows; a *step* is the micro-batches of one optimiser step on one rank. The plan of an epoch depends on (seed, epoch)
only.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

MicroBatch = list[tuple[int, ...]]
Step = list[MicroBatch]

_LENGTH_BITS = 5  # lengths are grouped by their leading bits, that is to within a sixteenth


def plan_batches(
    lengths: Sequence[int], *, max_tokens: int, seed: int, epoch: int, packed_length: int | None = None
) -> list[MicroBatch]:
    """The micro-batches of one epoch: every conversation once, rows * longest row <= max_tokens in each.

    Conversations of similar length meet in a batch, drawn anew each epoch, and the order of batches is drawn too.
    ``packed_length`` puts several conversations into a row of at most so many tokens; rows are then the same every
    epoch, but meet other rows. The number of batches is the same in every epoch, so that schedules can rely on it.
    """
    assert max([packed_length or 0, *lengths]) <= max_tokens, "a row fits into a micro-batch"
    generator = np.random.default_rng((seed, epoch))
    if packed_length is not None:
        rows = pack_rows(lengths, max_length=packed_length)
        shuffled = [rows[i] for i in generator.permutation(len(rows))]
        per_batch = max_tokens // packed_length
        return [shuffled[i : i + per_batch] for i in range(0, len(shuffled), per_batch)]
    batches = _group_by_length(lengths, max_tokens, generator.permutation(len(lengths)).tolist())
    return [batches[i] for i in generator.permutation(len(batches))]


def pack_rows(lengths: Sequence[int], *, max_length: int) -> list[tuple[int, ...]]:
    """Packs conversations into rows of at most ``max_length`` tokens: longest first, each into the fullest row it fits.

    None is longer than a row.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), ascending
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        at = bisect_left(room, (length, -1))
        left, row = room.pop(at) if at < len(room) else (max_length, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(index)
        if left > length:
            insort(room, (left - length, row))
    return [tuple(row) for row in rows]


def _group_by_length(lengths: Sequence[int], max_tokens: int, order: Sequence[int]) -> list[MicroBatch]:
    """Cuts the conversations of ``order``, sorted by rounded length and then as they stand there, into micro-batches.

    Rounding makes the borders depend on the lengths alone, so that every order gives the same number of batches.
    """
    batches: list[MicroBatch] = []
    for index in sorted(order, key=lambda i: _rounded(lengths[i])):
        length = min(_rounded(lengths[index]), max_tokens)
        if not batches or (len(batches[-1]) + 1) * length > max_tokens:
            batches.append([])
        batches[-1].append((index,))
    return batches


def _rounded(length: int) -> int:
    """The length, rounded up by at most a sixteenth."""
    step = 1 << max(0, length.bit_length() - _LENGTH_BITS)
    return -(-length // step) * step


def plan_evaluation(
    lengths: Sequence[int], chosen: Sequence[int], *, max_tokens: int, num_replicas: int, rank: int
) -> list[Step]:
    """One micro-batch a step in a fixed order; over all ranks every chosen conversation exactly once.

    All ranks get the same number of steps, so that collective operations meet: a rank that runs out gets a micro-batch
    without any conversation.
    """
    batches = _group_by_length(lengths, max_tokens, chosen)
    num_missing = -len(batches) % num_replicas
    empty: MicroBatch = [()]
    return [[batch] for batch in [*batches, *[empty] * num_missing][rank::num_replicas]]
