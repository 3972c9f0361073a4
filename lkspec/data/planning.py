"""Which conversations meet in which micro-batch.

A *row* is the conversations that share one row of a batch (one, unless packed), as indices; a *micro-batch* is a list
of rows; a *step* is the micro-batches of one optimiser step on one rank. The plan of an epoch depends on (seed, epoch)
only.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

Row = tuple[int, ...]
MicroBatch = list[Row]
Step = list[MicroBatch]

_LENGTH_BITS = 5  # lengths are grouped by their leading bits, that is to within a sixteenth


def plan_batches(
    lengths: Sequence[int], *, max_tokens: int, seed: int, epoch: int, pack: bool = False, max_length: int | None = None
) -> list[MicroBatch]:
    """The micro-batches of one epoch: every conversation once, rows * longest row <= max_tokens in each.

    Conversations of similar length meet in a batch, drawn anew each epoch, and the order of batches is drawn too.
    ``pack`` puts several conversations into a row of at most ``max_length`` tokens; rows are then the same every
    epoch, but meet other rows. The number of batches is the same in every epoch, so that schedules can rely on it.

    Raises:
        ValueError: a conversation (or, packed, ``max_length``) longer than ``max_tokens``.
    """
    longest = max(lengths, default=0)
    if longest > max_tokens:
        raise ValueError(
            f"a conversation has {longest} tokens but a micro-batch only {max_tokens}: set data.max_tokens to at least "
            f"{longest}, or data.max_length to at most {max_tokens}"
        )
    generator = np.random.default_rng((seed, epoch))
    if pack:
        row_length = longest if max_length is None else max_length
        if row_length > max_tokens:
            raise ValueError(f"packed rows of data.max_length={row_length} need data.max_tokens >= {row_length}")
        rows = pack_rows(lengths, max_length=row_length)
        shuffled = [rows[i] for i in generator.permutation(len(rows))]
        per_batch = max_tokens // row_length
        return [shuffled[i : i + per_batch] for i in range(0, len(shuffled), per_batch)]
    batches = _group_by_length(lengths, max_tokens, generator.permutation(len(lengths)).tolist())
    return [batches[i] for i in generator.permutation(len(batches))]


def pack_rows(lengths: Sequence[int], *, max_length: int) -> list[Row]:
    """Packs conversations into rows of at most ``max_length`` tokens: longest first, each into the fullest row it fits.

    Raises:
        ValueError: a conversation longer than ``max_length``.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), ascending
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        if length > max_length:
            raise ValueError(f"a conversation has {length} tokens: packed rows hold data.max_length={max_length}")
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
