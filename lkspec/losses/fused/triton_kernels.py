"""Triton kernels over rows of logits: what ``triton_rows`` launches.

A row belongs to one program, so nothing is added up by atomics and equal inputs give equal bits. The program reads
its row in tiles of 16-byte loads and keeps its sums lane by lane; warps meet once a pass. The passes:

    1. peak, normaliser and argmax of the draft      (the target's, in a kernel of its own, serve all depths)
    2. kl, reverse_kl and overlap, backwards: what pass 1 read last is still in a cache
    3. d loss / dz over the draft logits, in place; in backward this is the only pass

Not one row over several programs: thousands of rows fill the device, and a split row would need a pass more. Of a
truncated vocabulary the target's columns are copied out once: they serve two passes or more at each of K depths, and
gathering them there would read nearly every 32-byte sector of the wide row each time, by loads of two bytes.

Inside, exponents count powers of two: with a row's ``shift`` = the peak of z log2(e) and ``total`` = sum_v 2^u_v,
u_v = z_v log2(e) - shift is at most 0 and log2 q_v = u_v - log2(total). log_alpha is taken from sum_v min(p_v, q_v)
unless that is below 2^-60; such rows are read once more, by exponents alone.

Shape letters: a program has ROWS rows and LANES lanes of 8 neighbouring columns, tiles [ROWS, LANES, 8].
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from lkspec.losses.divergences import LOG_ZERO

VECTOR = tl.constexpr(8)  # neighbouring columns of a lane: 16 bytes of bfloat16
LOG2_E = tl.constexpr(math.log2(math.e))
_LN_2 = tl.constexpr(math.log(2))
_LOG_ZERO = tl.constexpr(LOG_ZERO * math.log2(math.e))
_FAR = tl.constexpr(-1e30)  # below every logit; finite, so that differences of two are not NaN
_NONE = tl.constexpr(float("-inf"))
_SMALL = tl.constexpr(-60.0)  # log2 of the alpha below which the sum of min(p, q) loses terms to underflow


@triton.jit
def _rows(ROWS: tl.constexpr) -> tl.tensor:
    return tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)


@triton.jit
def _first_columns(LANES: tl.constexpr) -> tl.tensor:
    """Columns of the first tile, [1, LANES, 8]."""
    return tl.arange(0, LANES)[None, :, None] * VECTOR + tl.arange(0, VECTOR)[None, None, :]


@triton.jit
def _meet(shift: tl.tensor, total: tl.tensor) -> tl.tensor:
    """The lanes' peaks, and sums of powers of two below them, become their row's."""
    peak = tl.max(shift, 1)
    return peak, tl.sum(total * tl.exp2(shift - peak[:, None]), 1)


@triton.jit
def _normaliser(
    row: tl.tensor, valid: tl.tensor, width: tl.tensor, scale: tl.tensor, ROWS: tl.constexpr, LANES: tl.constexpr
) -> tl.tensor:
    """Pass 1: shift, total, and the first column of the largest logit."""
    columns = _first_columns(LANES)
    shift = tl.full([ROWS, LANES], _FAR, tl.float32)
    total = tl.full([ROWS, LANES], 0.0, tl.float32)
    largest = tl.full([ROWS, LANES], _FAR, tl.float32)
    found = tl.full([ROWS, LANES], 0, tl.int32)  # the tile in which a lane met its largest
    for begin in range(0, width, LANES * VECTOR):
        at = begin + columns
        x = tl.load(row + at, mask=valid & (at < width), other=_NONE).to(tl.float32)
        here = tl.max(x, 2)
        found = tl.where(here > largest, begin, found)
        largest = tl.maximum(here, largest)
        higher = tl.maximum(shift, here * scale)
        total = total * tl.exp2(shift - higher) + tl.sum(tl.exp2(tl.fma(x, scale, -higher[:, :, None])), 2)
        shift = higher
    best = tl.max(largest, 1)
    found += tl.arange(0, LANES)[None, :] * VECTOR
    first = tl.min(tl.where(largest == best[:, None], found, width), 1)
    at = first[:, None, None] + tl.arange(0, VECTOR)[None, None, :]
    x = tl.load(row + at, mask=valid & (at < width), other=_NONE).to(tl.float32)
    first = tl.min(tl.min(tl.where(x == best[:, None, None], at, width - 1), 2), 1)
    shift, total = _meet(shift, total)
    return shift, total, first


@triton.jit
def _copy_columns(
    row: tl.tensor,
    out: tl.tensor,
    ids: tl.tensor,
    valid: tl.tensor,
    width: tl.tensor,
    scale: tl.tensor,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
) -> tl.tensor:
    """The draft vocabulary's columns of a target row, side by side; their shift and total."""
    columns = _first_columns(LANES)
    shift = tl.full([ROWS, LANES], _FAR, tl.float32)
    total = tl.full([ROWS, LANES], 0.0, tl.float32)
    for begin in range(0, width, LANES * VECTOR):
        at = begin + columns
        source = tl.load(ids + at, mask=at < width, other=0)
        x = tl.load(row + source, mask=valid & (at < width), other=_NONE)
        tl.store(out + at, x, mask=valid & (at < width))
        x = x.to(tl.float32)
        higher = tl.maximum(shift, tl.max(x, 2) * scale)
        total = total * tl.exp2(shift - higher) + tl.sum(tl.exp2(tl.fma(x, scale, -higher[:, :, None])), 2)
        shift = higher
    return _meet(shift, total)


@triton.jit
def _overlap_by_exponents(
    pair: tl.tensor,
    valid: tl.tensor,
    width: tl.tensor,
    log_total: tl.tensor,
    offset: tl.tensor,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
) -> tl.tensor:
    """log2 alpha, and the share of it where q < p, however small they are."""
    draft, draft_scale, draft_shift, target, target_scale, target_shift = pair
    columns = _first_columns(LANES)
    shift = tl.full([ROWS, LANES], _FAR, tl.float32)
    total = tl.full([ROWS, LANES], 0.0, tl.float32)
    below_total = tl.full([ROWS, LANES], 0.0, tl.float32)
    for begin in range(0, width, LANES * VECTOR):
        at = begin + columns
        x = tl.load(draft + at, mask=valid & (at < width), other=_NONE).to(tl.float32)
        y = tl.load(target + at, mask=valid & (at < width), other=_NONE).to(tl.float32)
        logq = tl.fma(x, draft_scale, -(draft_shift + log_total)[:, None, None])
        logp = tl.fma(y, target_scale, -(target_shift + offset)[:, None, None])
        below = logq < logp
        smaller = tl.where(below, logq, logp)
        higher = tl.maximum(shift, tl.max(smaller, 2))
        term = tl.exp2(smaller - higher[:, :, None])
        total = total * tl.exp2(shift - higher) + tl.sum(term, 2)
        below_total = below_total * tl.exp2(shift - higher) + tl.sum(tl.where(below, term, 0.0), 2)
        shift = higher
    _, below_total = _meet(shift, below_total)
    shift, total = _meet(shift, total)
    return shift + tl.log2(total), below_total / total


@triton.jit
def _comparison(
    pair: tl.tensor,
    valid: tl.tensor,
    width: tl.tensor,
    total: tl.tensor,
    mass: tl.tensor,
    offset: tl.tensor,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
) -> tl.tensor:
    """Pass 2, from the last tile to the first: kl and reverse_kl in nats, log2 alpha, its share where q < p."""
    draft, draft_scale, draft_shift, target, target_scale, target_shift = pair
    log_total, log_mass = tl.log2(total), tl.log2(mass)
    floor = (log_mass + _LOG_ZERO)[:, None, None]
    columns = _first_columns(LANES)
    forward = tl.full([ROWS, LANES], 0.0, tl.float32)  # sum of 2^w (u - w)
    reverse = tl.full([ROWS, LANES], 0.0, tl.float32)  # sum of 2^u (u - w)
    below_sum = tl.full([ROWS, LANES], 0.0, tl.float32)  # sum of 2^u where q < p
    above_sum = tl.full([ROWS, LANES], 0.0, tl.float32)  # sum of 2^w elsewhere
    last = (width - 1) // (LANES * VECTOR) * (LANES * VECTOR)
    for distance in range(0, width, LANES * VECTOR):
        at = last - distance + columns
        x = tl.load(draft + at, mask=valid & (at < width), other=_FAR).to(tl.float32)
        y = tl.load(target + at, mask=valid & (at < width), other=_NONE).to(tl.float32)
        u = tl.fma(x, draft_scale, -draft_shift[:, None, None])
        w = tl.fma(y, target_scale, -target_shift[:, None, None])
        w = tl.where(w == _NONE, floor, w)
        q, p, gap = tl.exp2(u), tl.exp2(w), u - w
        below = gap < (log_total - offset)[:, None, None]
        forward += tl.sum(p * gap, 2)
        reverse += tl.sum(q * gap, 2)
        below_sum += tl.sum(tl.where(below, q, 0.0), 2)
        above_sum += tl.sum(tl.where(below, 0.0, p), 2)
    level = log_total - log_mass
    kl = (level - tl.sum(forward, 1) / mass) * _LN_2
    reverse_kl = (tl.sum(reverse, 1) / total - level) * _LN_2
    below_part = tl.sum(below_sum, 1) / total
    overlap = below_part + tl.sum(above_sum, 1) * tl.exp2(-offset)
    log_overlap, share = tl.log2(overlap), below_part / overlap
    if tl.min(log_overlap, 0) < _SMALL:
        exact, exact_share = _overlap_by_exponents(pair, valid, width, log_total, offset, ROWS, LANES)
        share = tl.where(log_overlap < _SMALL, exact_share, share)
        log_overlap = tl.where(log_overlap < _SMALL, exact, log_overlap)
    return kl, reverse_kl, log_overlap, share


@triton.jit
def _slopes_in_place(
    pair: tl.tensor,
    valid: tl.tensor,
    width: tl.tensor,
    sums: tl.tensor,
    slopes: tl.tensor,
    factor: tl.tensor,
    HAS_REVERSE: tl.constexpr,
    ANY_SMALL: tl.constexpr,
    LANES: tl.constexpr,
) -> None:
    """Pass 3: d loss / dz times ``factor`` over the draft's logits, from sums of q, p and q [q < p].

    With g_x the slope in statistic x: d loss / dz_v = q_v (g_kl + g_alpha ([q_v < p_v] / alpha - share)
    + g_reverse (log q_v - log p~_v - reverse_kl)) - g_kl p~_v.
    """
    draft, draft_scale, draft_shift, target, target_scale, target_shift = pair
    total, mass, offset, reverse_kl, log_overlap, share = sums
    d_kl, d_reverse_kl, d_log_alpha = slopes
    log_total, log_mass = tl.log2(total), tl.log2(mass)
    is_small = log_overlap < _SMALL
    of_q = (d_kl - d_log_alpha * share) / total * factor
    of_below = of_q + tl.where(is_small, 0.0, d_log_alpha * tl.exp2(-log_overlap) / total) * factor
    of_p = d_kl / mass * factor
    columns = _first_columns(LANES)
    for begin in range(0, width, LANES * VECTOR):
        at = begin + columns
        x = tl.load(draft + at, mask=valid & (at < width), other=_FAR).to(tl.float32)
        y = tl.load(target + at, mask=valid & (at < width), other=_NONE).to(tl.float32)
        u = tl.fma(x, draft_scale, -draft_shift[:, None, None])
        w = tl.fma(y, target_scale, -target_shift[:, None, None])
        below = u - w < (log_total - offset)[:, None, None]
        weight = tl.where(below, of_below[:, None, None], of_q[:, None, None])
        if HAS_REVERSE:
            gap = u - tl.where(w == _NONE, (log_mass + _LOG_ZERO)[:, None, None], w)
            level = (log_total - log_mass) * _LN_2 + reverse_kl
            weight += (d_reverse_kl / total * factor)[:, None, None] * (gap * _LN_2 - level[:, None, None])
        slope = tl.exp2(u) * weight - of_p[:, None, None] * tl.exp2(w)
        if ANY_SMALL:  # q / alpha is at most 1 where q < p, though 1 / alpha may overflow
            ratio = tl.exp2(u - (log_total + log_overlap)[:, None, None])
            ratio = tl.where(below & is_small[:, None, None], ratio, 0.0)
            slope += (d_log_alpha * factor)[:, None, None] * ratio
        tl.store(draft + at, slope.to(draft.dtype.element_ty), mask=valid & (at < width))


@triton.jit
def _slopes(
    pair: tl.tensor,
    valid: tl.tensor,
    width: tl.tensor,
    sums: tl.tensor,
    slopes: tl.tensor,
    row: tl.tensor,
    num_rows: tl.tensor,
    reachable: tl.tensor,
    factor: tl.tensor,
    HAS_REVERSE: tl.constexpr,
    LANES: tl.constexpr,
) -> None:
    """Reads a row's slopes in kl, reverse_kl and log_alpha, and runs pass 3; rows of tiny alpha take a loop apart."""
    known = (row < num_rows) & reachable
    d_kl = tl.load(slopes + row, mask=known, other=0.0)
    d_reverse_kl = tl.load(slopes + num_rows + row, mask=known, other=0.0)
    d_log_alpha = tl.load(slopes + 2 * num_rows + row, mask=known, other=0.0)
    d_all = (d_kl, d_reverse_kl, d_log_alpha)
    if tl.min(sums[4], 0) < _SMALL:
        _slopes_in_place(pair, valid, width, sums, d_all, factor, HAS_REVERSE, True, LANES)
    else:
        _slopes_in_place(pair, valid, width, sums, d_all, factor, HAS_REVERSE, False, LANES)


@triton.jit
def _target_state(state: tl.tensor, row: tl.tensor, num_rows: tl.tensor) -> tl.tensor:
    """shift, mass (1 for a row that has none inside the draft vocabulary), offset, and whether it has any."""
    shift = tl.load(state + row, mask=row < num_rows, other=0.0)
    mass = tl.load(state + num_rows + row, mask=row < num_rows, other=1.0)
    offset = tl.load(state + 2 * num_rows + row, mask=row < num_rows, other=0.0)
    reachable = mass != 0  # NaN stays NaN
    return shift, tl.where(reachable, mass, 1.0), offset, reachable


@triton.jit
def target_kernel(
    logits: tl.tensor,
    columns: tl.tensor,
    ids: tl.tensor,
    state: tl.tensor,
    top1: tl.tensor,
    num_rows: tl.tensor,
    target_width: tl.tensor,
    draft_width: tl.tensor,
    scale: tl.tensor,
    TRUNCATED: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
) -> None:
    row = _rows(ROWS)
    valid = (row < num_rows)[:, None, None]
    logits += (row * target_width)[:, None, None]
    shift, total, best = _normaliser(logits, valid, target_width, scale, ROWS, LANES)
    offset, mass = tl.log2(total), total
    if TRUNCATED:
        columns += (row * draft_width)[:, None, None]
        inside, mass = _copy_columns(logits, columns, ids, valid, draft_width, scale, ROWS, LANES)
        offset += shift - inside
        shift = inside
    tl.store(state + row, shift, mask=row < num_rows)
    tl.store(state + num_rows + row, mass, mask=row < num_rows)
    tl.store(state + 2 * num_rows + row, offset, mask=row < num_rows)
    tl.store(top1 + row, best.to(tl.int64), mask=row < num_rows)


@triton.jit
def draft_kernel(
    draft: tl.tensor,
    target: tl.tensor,
    target_state: tl.tensor,
    target_top1: tl.tensor,
    tokens: tl.tensor,
    ids: tl.tensor,
    draft_ids: tl.tensor,
    stats: tl.tensor,
    slopes: tl.tensor,
    num_rows: tl.tensor,
    width: tl.tensor,
    draft_scale: tl.tensor,
    target_scale: tl.tensor,
    factor: tl.tensor,
    HAS_TEXT: tl.constexpr,
    TRUNCATED: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    HAS_REVERSE: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
) -> None:
    """Passes 1 and 2, and where the slopes are known already pass 3 as well."""
    row = _rows(ROWS)
    inside = row < num_rows
    valid = inside[:, None, None]
    target_shift, mass, offset, reachable = _target_state(target_state, row, num_rows)
    draft_row, target_row = draft + (row * width)[:, None, None], target + (row * width)[:, None, None]
    shift, total, best = _normaliser(draft_row, valid, width, draft_scale, ROWS, LANES)
    pair = (draft_row, draft_scale, shift, target_row, target_scale, target_shift)
    kl, reverse_kl, log_overlap, share = _comparison(pair, valid, width, total, mass, offset, ROWS, LANES)
    log_overlap, share = tl.where(reachable, log_overlap, 0.0), tl.where(reachable, share, 0.0)
    tl.store(stats + row, tl.where(reachable, kl, 0.0), mask=inside)
    tl.store(stats + num_rows + row, tl.where(reachable, reverse_kl, 0.0), mask=inside)
    tl.store(stats + 2 * num_rows + row, tl.where(reachable, log_overlap, _LOG_ZERO) * _LN_2, mask=inside)
    tl.store(stats + 3 * num_rows + row, log_overlap, mask=inside)
    tl.store(stats + 4 * num_rows + row, share, mask=inside)
    tl.store(stats + 5 * num_rows + row, shift, mask=inside)
    tl.store(stats + 6 * num_rows + row, total, mask=inside)
    if HAS_TEXT:
        token = tl.load(tokens + row, mask=inside, other=0)
        proposed, column = best.to(tl.int64), token
        if TRUNCATED:
            proposed, column = tl.load(ids + best), tl.load(draft_ids + token)
        known = inside & (column >= 0)
        x = tl.load(draft + row * width + column, mask=known, other=0.0).to(tl.float32)
        y = tl.load(target + row * width + column, mask=known, other=0.0).to(tl.float32)
        log_ratio = (tl.fma(x, draft_scale, -shift) - tl.log2(total)) - (
            tl.fma(y, target_scale, -target_shift) - offset
        )
        top1 = tl.load(target_top1 + row, mask=inside, other=-1)
        tl.store(stats + 7 * num_rows + row, tl.where(known, tl.exp2(tl.minimum(log_ratio, 0.0)), 0.0), mask=inside)
        tl.store(stats + 8 * num_rows + row, (proposed == top1).to(tl.float32), mask=inside)
        tl.store(stats + 9 * num_rows + row, (proposed == token).to(tl.float32), mask=inside)
    if HAS_SLOPES:
        tl.debug_barrier()  # every warp has read the text's token before any writes over it
        sums = (total, mass, offset, reverse_kl, log_overlap, share)
        _slopes(pair, valid, width, sums, slopes, row, num_rows, reachable, factor, HAS_REVERSE, LANES)


@triton.jit
def slopes_kernel(
    draft: tl.tensor,
    target: tl.tensor,
    target_state: tl.tensor,
    stats: tl.tensor,
    slopes: tl.tensor,
    num_rows: tl.tensor,
    width: tl.tensor,
    draft_scale: tl.tensor,
    target_scale: tl.tensor,
    factor: tl.tensor,
    HAS_REVERSE: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
) -> None:
    """Pass 3 alone, from what passes 1 and 2 stored."""
    row = _rows(ROWS)
    inside = row < num_rows
    target_shift, mass, offset, reachable = _target_state(target_state, row, num_rows)
    reverse_kl = tl.load(stats + num_rows + row, mask=inside, other=0.0)
    log_overlap = tl.load(stats + 3 * num_rows + row, mask=inside, other=0.0)
    share = tl.load(stats + 4 * num_rows + row, mask=inside, other=0.0)
    shift = tl.load(stats + 5 * num_rows + row, mask=inside, other=0.0)
    total = tl.load(stats + 6 * num_rows + row, mask=inside, other=1.0)
    draft_row, target_row = draft + (row * width)[:, None, None], target + (row * width)[:, None, None]
    pair = (draft_row, draft_scale, shift, target_row, target_scale, target_shift)
    sums = (total, mass, offset, reverse_kl, log_overlap, share)
    _slopes(pair, inside[:, None, None], width, sums, slopes, row, num_rows, reachable, factor, HAS_REVERSE, LANES)
