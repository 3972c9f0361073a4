"""``token_stats`` from hidden states without any [tokens, vocabulary] tensor that outlives its chunk.

The same statistics as ``divergences.logit_stats``, the readable definition, as one ``torch.autograd.Function`` that
goes through chunks of target rows. Row r serves anchor r - k at every depth k, so the target's logits are computed once
for all K depths. Two ways to the gradient, the same numbers:

- *recompute*: forward keeps a few numbers of each row; backward computes a chunk's draft logits and the target's draft
  columns again, and forms d/dz from d loss / d kl, d reverse_kl and d log_alpha.
- *in forward*: where an objective's value is a function of the row alone and the weight of each depth is known, d/dz is
  formed while the logits are alive, and backward only scales. A value that depends on the mean alpha of its depth as
  well allows this where a single chunk holds all rows.

Products with heads are here; what happens to a chunk's logits between them is in ``torch_rows``, and on a GPU in
``triton_rows``.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from lkspec.losses.divergences import RowValue, check_temperature
from lkspec.losses.fused import torch_rows
from lkspec.losses.fused.chunks import ChunkPass, Chunks, chunk_rows, products_span_depths, served_rows
from lkspec.losses.fused.head_gradients import HeadGradients
from lkspec.losses.fused.in_forward import InForward
from lkspec.losses.target_filter import TargetFilter
from lkspec.types import HeadSummary, LinearHead, TokenStats
from lkspec.vocab import DraftVocab

_STATS = ("kl", "reverse_kl", "log_alpha", "accept_prob", "top1", "hit", "coverage")
_DIFFERENTIABLE = ("kl", "reverse_kl", "log_alpha")


def token_stats(
    hidden: Float[Tensor, "K B T H"],
    heads: Sequence[LinearHead],
    target_hidden: Float[Tensor, "B T Ht"],
    target_head: LinearHead,
    vocab: DraftVocab,
    tokens: Int[Tensor, "B T"],
    mask: Bool[Tensor, "K B T"],
    *,
    temperature: float | Float[Tensor, "B T"] = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    target_summary: HeadSummary | None = None,
    row_value: RowValue | None = None,
    in_forward: InForward | None = None,
    chunk_size: int | None = None,
) -> TokenStats:
    """Statistics of every supervised (depth, row, anchor), from hidden states, at bounded memory.

    Equivalent to, wherever ``mask[k-1, b, t]`` is set (0-based t)::

        logit_stats(heads[k-1].logits(hidden[k-1, b, t]), target_head.logits(target_hidden[b, t + k]),
                    tokens[b, t + k + 1], vocab)

    Where the mask is 0 the statistics and the gradients are exactly zero, whatever the hidden states hold there.
    kl, reverse_kl and log_alpha carry gradients, once.

    Args:
        hidden: the draft's hidden states, which multiply its heads.
        heads: entry k - 1 for depth k; may be one object repeated.
        target_hidden: ``TargetStates.last``.
        target_head: the target's head.
        vocab: which target tokens the draft can propose.
        tokens: the text, as target ids.
        mask: ``Batch.depth_mask(K)``, or a part of it; on the host it spares waiting for the device of the others.
        temperature: divides both logits; a tensor has one for each target row, ``temperature[b, t + k]`` above.
        top_k, top_p: filter p alone, see ``TargetFilter``; backward filters again.
        target_summary: of ``target_hidden``'s logits, [B, T]: spares their products with the head outside a
            truncated draft vocabulary. Not read where p is filtered or of another temperature than 1.
        row_value: a form (b) objective; its values, ``TokenStats.row_value``, carry gradients too. Its own arithmetic
            runs under autograd, a cache's worth of rows at a time.
        in_forward: forms this objective's gradient at once, if it can; its values are then ``TokenStats.value``, and
            the other statistics carry no gradient.
        chunk_size: target rows a chunk; None derives it from a memory budget, see ``chunk_rows``.

    Raises:
        ValueError: heads that are not one a depth, a chunk size below 1, a temperature that is not positive or not one
            a target row, top_k or top_p out of range.
    """
    target_filter = TargetFilter(top_k, top_p)
    if chunk_size is None:
        chunk_size = chunk_rows(vocab, len(heads), hidden.device, filtered=target_filter.is_on)
    if len(heads) != len(hidden):
        raise ValueError(f"heads: expected one a depth, {len(hidden)}, got {len(heads)}; repeat a head that is shared")
    if chunk_size < 1:
        raise ValueError(f"chunk_size: expected at least 1 target row, got {chunk_size}")
    check_temperature(temperature, tokens)
    if isinstance(temperature, Tensor):
        temperature = temperature.to(hidden.device)
    if vocab.is_full or target_filter.is_on or isinstance(temperature, Tensor) or temperature != 1.0:
        target_summary = None
    chunks = Chunks(
        heads=tuple(heads),
        target_head=target_head,
        vocab=vocab,
        temperature=temperature,
        target_filter=target_filter,
        row_value=row_value,
        in_forward=in_forward,
        chunk_size=chunk_size,
        served=served_rows(mask).to(hidden.device),
        autocast_dtype=_autocast_dtype(hidden),
        learns=torch.is_grad_enabled(),
        summary=target_summary,
    )
    if in_forward is not None and in_forward.reads_mean_alpha and chunks.num_chunks > 1:
        chunks = replace(chunks, in_forward=None)
    rows = _FusedStats.apply(chunks, hidden, target_hidden, tokens, *chunks.parameters)
    mask = mask.to(hidden.device, non_blocking=True)
    placed = {name: chunks.served.place(value, mask) for name, value in zip(_names(chunks), rows, strict=True)}
    return TokenStats(mask=mask, **placed)


def _autocast_dtype(hidden: Tensor) -> torch.dtype | None:
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def row_functions(chunks: Chunks, device: torch.device) -> ModuleType:
    """What happens to a chunk's logits: ``torch_rows``, or of statistics in float32 on a GPU, ``triton_rows``."""
    if device.type != "cuda" or chunks.dtype != torch.float32 or chunks.row_value is not None or not _has_triton():
        return torch_rows
    from lkspec.losses.fused import triton_rows  # triton is not for every machine

    return triton_rows


@cache
def _has_triton() -> bool:
    found = importlib.util.find_spec("triton") is not None
    if not found:
        warnings.warn("triton is not installed: losses on this GPU run in plain torch, slower", stacklevel=2)
    return found


def _names(chunks: Chunks) -> tuple[str, ...]:
    """The statistics in the order of the function's outputs."""
    form_b = () if chunks.row_value is None else ("row_value",)
    return (*_STATS, *form_b) if chunks.in_forward is None else (*_STATS, *form_b, "value")


def _differentiable(chunks: Chunks) -> tuple[str, ...]:
    """Those that carry gradients."""
    if chunks.in_forward is not None:
        return ("value",)
    return _DIFFERENTIABLE if chunks.row_value is None else (*_DIFFERENTIABLE, "row_value")


class _FusedStats(torch.autograd.Function):
    """The statistics of all target rows at all depths, [K, R] each."""

    @staticmethod
    def forward(
        ctx: Any,
        chunks: Chunks,
        hidden: Float[Tensor, "K B T H"],
        target_hidden: Float[Tensor, "B T Ht"],
        tokens: Int[Tensor, "B T"],
        *parameters: Tensor,
    ) -> tuple[Float[Tensor, "K R"], ...]:
        names = _names(chunks)
        results = {name: hidden.new_empty(chunks.served.needed.shape, dtype=chunks.dtype) for name in names}
        log_coverage = torch.empty_like(results["kl"][0])
        gradients = _gradients(ctx, chunks, hidden) if chunks.learns and chunks.in_forward is not None else None
        with torch.autocast(hidden.device.type, enabled=False):  # ``Chunks`` has chosen the precision
            on_rows = row_functions(chunks, hidden.device)
            run = ChunkPass(chunks, hidden, target_hidden, columns=chunks.summary is not None)
            for rows in chunks.slices():
                target = _read_target(on_rows, chunks, run, rows)
                log_coverage[rows] = target.log_coverage
                text = tokens.flatten()[chunks.served.rows[rows] + 1]
                for depth, logits in run.draft_logits(rows, gradients):
                    stats = on_rows.row_stats(
                        logits,
                        target,
                        text,
                        chunks.vocab,
                        run.scratch,
                        chunks.row_value,
                        leave_probs=gradients is not None,
                    )
                    if chunks.in_forward is not None:
                        values, slopes = chunks.in_forward.slopes(stats, depth, chunks.served.needed[depth, rows])
                        if gradients is not None:
                            on_rows.d_logits(logits, target, stats, slopes, run.scratch, chunks.row_value)
                        stats["value"] = values
                    for name in names:
                        results[name][depth, rows] = stats[name]
        ctx.chunks, ctx.gradients = chunks, gradients
        ctx.set_materialize_grads(False)  # statistics that the loss does not use cost nothing in backward
        if chunks.in_forward is None:
            ctx.save_for_backward(hidden, target_hidden, results["log_alpha"], results["reverse_kl"], log_coverage)
        ctx.mark_non_differentiable(*(results[name] for name in names if name not in _differentiable(chunks)))
        return tuple(results[name] for name in names)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Float[Tensor, "K R"] | None) -> tuple[Tensor | None, ...]:
        chunks: Chunks = ctx.chunks
        by_name = {name: slope for name, slope in zip(_names(chunks), upstream, strict=True) if slope is not None}
        if chunks.in_forward is not None:
            return _outputs(ctx.gradients, chunks.in_forward.factor(by_name["value"], chunks.served.needed))
        hidden, target_hidden, log_alpha, reverse_kl, log_coverage = ctx.saved_tensors
        gradients = _gradients(ctx, chunks, hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            on_rows = row_functions(chunks, hidden.device)
            run = ChunkPass(chunks, hidden, target_hidden, columns=not chunks.target_filter.is_on)
            for rows in chunks.slices():
                if chunks.target_filter.is_on:
                    target = _read_target(on_rows, chunks, run, rows)
                else:
                    target = on_rows.read_target_columns(
                        run.target_logits(rows), log_coverage[rows], run.scratch, keep_probs=len(chunks.heads) > 1
                    )
                for depth, logits in run.draft_logits(rows, gradients):
                    stats = {"log_alpha": log_alpha[depth, rows], "reverse_kl": reverse_kl[depth, rows]}
                    # Zero at rows that the depth does not need: ``place`` lets no gradient through to them.
                    slopes = {name: slope[depth, rows] for name, slope in by_name.items()}
                    on_rows.d_logits(logits, target, stats, slopes, run.scratch, chunks.row_value)
        return _outputs(gradients)


def _read_target(on_rows: ModuleType, chunks: Chunks, run: ChunkPass, rows: slice) -> Any:
    """The target's side of a chunk: on a CPU without its logits, where the draft vocabulary leaves most of them out."""
    options: dict[str, Any] = {"keep_probs": len(chunks.heads) > 1}
    if chunks.summary is not None:
        return on_rows.read_target_inside(run.target_logits(rows), chunks.summary_of(rows), run.scratch, **options)
    wide = chunks.vocab.is_full or chunks.target_filter.is_on or products_span_depths(chunks.served.rows.device)
    if wide or on_rows is not torch_rows:
        return on_rows.read_target(run.target_logits(rows), chunks.vocab, chunks.target_filter, run.scratch, **options)
    return on_rows.read_target_pieces(
        run.target_pieces(rows), rows.stop - rows.start, chunks.vocab, run.scratch, **options
    )


def _gradients(ctx: Any, chunks: Chunks, hidden: Float[Tensor, "K B T H"]) -> HeadGradients:
    _, needs_hidden, _, _, *needs_parameters = ctx.needs_input_grad
    return HeadGradients(hidden, chunks.heads, chunks.parameters, needs_hidden, needs_parameters)


def _outputs(gradients: HeadGradients, factor: Tensor | None = None) -> tuple[Tensor | None, ...]:
    """In the order of the function's inputs."""
    of_hidden, of_parameters = gradients.all(factor)
    return None, of_hidden, None, None, *of_parameters
