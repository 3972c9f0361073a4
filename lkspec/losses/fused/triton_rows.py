"""The row functions of ``torch_rows`` on a GPU: a chunk's logits, as cuBLAS left them, through ``triton_kernels``."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from jaxtyping import Float, Int
from torch import Tensor

from lkspec.losses.fused.logits import Logits, Scratch
from lkspec.losses.fused.triton_kernels import LOG2_E, VECTOR, draft_kernel, slopes_kernel, target_kernel
from lkspec.losses.target_filter import TargetFilter
from lkspec.types import HeadSummary
from lkspec.vocab import DraftVocab


class Tile(NamedTuple):
    """How programs read rows: rows of a program and lanes of 8 columns each, powers of two; warps that share them."""

    rows: int
    lanes: int
    num_warps: int


def default_tile(width: int) -> Tile:
    """One lane a thread; up to 16 warps, of which two programs fit a multiprocessor."""
    lanes = min(512, triton.next_power_of_2(triton.cdiv(width, VECTOR.value)))
    rows = max(1, 64 // lanes)
    return Tile(rows, lanes, max(1, rows * lanes // 32))


class KernelTarget(NamedTuple):
    """The target's side of rows, shared by all depths.

    Attributes:
        values, scale: the logits over the temperature are scale * values, over the draft vocabulary.
        state: shift, mass and offset of each row: with w_v = z_v log2(e) - shift, mass = sum_v 2^w_v over the draft
            vocabulary (0 for a row without any) and log2 p_v = w_v - offset.
        log_coverage: log of p's mass over the draft vocabulary; -inf where there is none.
        top1: target id of argmax p over the full vocabulary.
    """

    values: Float[Tensor, "R D"]
    scale: float
    state: Float[Tensor, "3 R"]
    log_coverage: Float[Tensor, " R"]
    top1: Int[Tensor, " R"]


class KernelStats(dict[str, Tensor]):
    """Statistics by name, and in ``rows`` what passes 1 and 2 found, which spares ``d_logits`` both."""

    rows: Float[Tensor, "10 R"]


def read_target(
    logits: Logits,
    vocab: DraftVocab,
    target_filter: TargetFilter,
    scratch: Scratch,
    *,
    keep_probs: bool = False,
    tile: Tile | None = None,
) -> KernelTarget:
    """As ``target_rows.read_target``, but p is never kept; a full draft vocabulary leaves the logits where they are."""
    values, scale = _readable(logits)
    if target_filter.is_on:
        values, scale = target_filter(values.to(torch.float32) * scale), 1.0
    columns = values if vocab.is_full else scratch("target_columns", len(values), vocab.size, dtype=values.dtype)
    state, top1 = _read(values, columns, scale, vocab.ids, tile)
    _, mass, offset = state
    log_coverage = torch.zeros_like(mass) if vocab.is_full else (mass.log2() - offset) / LOG2_E.value
    return KernelTarget(columns, scale, state, log_coverage, top1)


def read_target_inside(
    logits: Logits,
    summary: HeadSummary,
    scratch: Scratch,
    *,
    keep_probs: bool = False,
    tile: Tile | None = None,
) -> KernelTarget:
    """As ``target_rows.read_target_inside``."""
    values, scale = _readable(logits)
    state, _ = _read(values, values, scale, None, tile)
    shift, mass, offset = state
    # Not below the normaliser of what is inside: coverage is at most 1, whatever precision the other was made in.
    torch.maximum(offset, summary.log_normaliser * LOG2_E.value - shift, out=offset)
    return KernelTarget(values, scale, state, (mass.log2() - offset) / LOG2_E.value, summary.argmax)


def read_target_columns(
    logits: Logits,
    log_coverage: Float[Tensor, " R"],
    scratch: Scratch,
    *,
    keep_probs: bool = False,
    tile: Tile | None = None,
) -> KernelTarget:
    """As ``target_rows.read_target_columns``."""
    values, scale = _readable(logits)
    state, top1 = _read(values, values, scale, None, tile)
    unreachable = log_coverage.isneginf()
    state[1].masked_fill_(unreachable, 0.0)
    state[2] -= log_coverage.masked_fill(unreachable, 0.0) * LOG2_E.value
    return KernelTarget(values, scale, state, log_coverage, top1)


def row_stats(
    logits: Logits,
    target: KernelTarget,
    tokens: Int[Tensor, " R"],
    vocab: DraftVocab,
    scratch: Scratch,
    row_value: None = None,
    *,
    leave_probs: bool = False,
    tile: Tile | None = None,
) -> KernelStats:
    """The statistics as ``divergences.logit_stats`` defines them; leaves the logits as they are."""
    values, scale = _readable(logits)
    stats = KernelStats()
    stats.rows = _compare(values, scale, target, tile, text=(tokens, vocab))
    stats |= dict(zip(("kl", "reverse_kl", "log_alpha"), stats.rows[:3], strict=True))
    stats |= dict(zip(("accept_prob", "top1", "hit"), stats.rows[7:], strict=True))
    stats["coverage"] = target.log_coverage.exp()
    return stats


def d_logits(
    logits: Logits,
    target: KernelTarget,
    stats: dict[str, Float[Tensor, " R"]],
    slopes: dict[str, Float[Tensor, " R"]],
    scratch: Scratch,
    row_value: None = None,
    *,
    tile: Tile | None = None,
) -> None:
    """Overwrites the product with d loss / d product, from ``slopes``, d loss / d statistics.

    One pass after ``row_stats``; from other ``stats`` (in backward) all three, in one kernel.
    """
    values, scale = _readable(logits)
    in_place = values is logits.product
    out, factor = (values, scale) if in_place else (values.clone(), 1.0)
    zeros = torch.zeros_like(target.log_coverage)
    stacked = torch.stack([slopes.get(name, zeros) for name in ("kl", "reverse_kl", "log_alpha")])
    has_reverse = "reverse_kl" in slopes
    if isinstance(stats, KernelStats):
        num_rows, width = values.shape
        tile = tile or default_tile(width)
        slopes_kernel[(triton.cdiv(num_rows, tile.rows),)](
            out, target.values, target.state, stats.rows, stacked, num_rows, width, scale * LOG2_E.value,
            target.scale * LOG2_E.value, factor, HAS_REVERSE=has_reverse, **_options(tile),
        )  # fmt: skip
    else:
        _compare(out, scale, target, tile, slopes=stacked, factor=factor, has_reverse=has_reverse)
    if not in_place:
        logits.overwrite(slice(0, len(values)), out, values)


def _readable(logits: Logits) -> tuple[Float[Tensor, "R W"], float]:
    """What kernels read, and what they multiply it by: the product itself, or float32 logits over the temperatures."""
    product, head = logits.product, logits.head
    plain = head.bias is None and head.soft_cap is None and head.scale > 0
    # float16 has no number that can stand behind a row's end.
    plain &= product.dtype in (torch.bfloat16, torch.float32)
    if plain and not isinstance(logits.temperature, Tensor):
        return product, head.scale / logits.temperature
    values = logits.values(slice(0, len(product)), torch.float32)
    return (values.clone() if values is product else values), 1.0


def _options(tile: Tile) -> dict[str, Any]:
    return {"ROWS": tile.rows, "LANES": tile.lanes, "num_warps": tile.num_warps, "enable_fp_fusion": True}


def _read(
    values: Float[Tensor, "R V"],
    columns: Float[Tensor, "R D"],
    scale: float,
    ids: Int[Tensor, " D"] | None,
    tile: Tile | None,
) -> tuple[Float[Tensor, "3 R"], Int[Tensor, " R"]]:
    """State and argmax of target rows; fills ``columns``, unless they are the values."""
    num_rows, width = values.shape
    state = torch.empty(3, num_rows, device=values.device)
    top1 = torch.empty(num_rows, dtype=torch.int64, device=values.device)
    tile = tile or default_tile(width)
    target_kernel[(triton.cdiv(num_rows, tile.rows),)](
        values, columns, top1 if ids is None else ids, state, top1, num_rows, width, columns.shape[1],
        scale * LOG2_E.value, TRUNCATED=columns is not values, **_options(tile),
    )  # fmt: skip
    return state, top1


def _compare(
    values: Float[Tensor, "R D"],
    scale: float,
    target: KernelTarget,
    tile: Tile | None,
    *,
    text: tuple[Int[Tensor, " R"], DraftVocab] | None = None,
    slopes: Float[Tensor, "3 R"] | None = None,
    factor: float = 1.0,
    has_reverse: bool = False,
) -> Float[Tensor, "10 R"]:
    """Passes 1 and 2, and 3 where slopes are given: kl, reverse_kl, log_alpha, state of the draft's rows, text's."""
    num_rows, width = values.shape
    stats = torch.empty(10, num_rows, device=values.device)
    tokens, ids, draft_ids = (target.top1,) * 3 if text is None else (text[0], text[1].ids, text[1].draft_ids)
    tile = tile or default_tile(width)
    draft_kernel[(triton.cdiv(num_rows, tile.rows),)](
        values, target.values, target.state, target.top1, tokens, ids, draft_ids, stats,
        stats if slopes is None else slopes, num_rows, width,
        scale * LOG2_E.value, target.scale * LOG2_E.value, factor,
        HAS_TEXT=text is not None, TRUNCATED=text is not None and not text[1].is_full,
        HAS_SLOPES=slopes is not None, HAS_REVERSE=has_reverse, **_options(tile),
    )  # fmt: skip
    return stats
