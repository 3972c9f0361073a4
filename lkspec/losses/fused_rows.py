"""What ``fused_linear`` does with one chunk of rows: logits, statistics, and the slopes of a loss in the logits.

With M_v = [q_v < p_v], z the draft's logits over the temperature, and everything by exponents that cannot overflow::

    d kl / dz = q - p~            d reverse_kl / dz = q (log q - log p~ - reverse_kl)
    d log_alpha / dz = M q / alpha - q sum_v(M_v q_v / alpha)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lkspec.losses.divergences import LOG_ZERO
from lkspec.types import LinearHead
from lkspec.vocab import DraftVocab


class HeadLogits(NamedTuple):
    """A head's logits of some rows, and what carries their gradient back.

    Attributes:
        values: the logits over the temperature, in at least float32.
        slope: d values / d (h W^T).
        hidden: h, as it was multiplied.
        weight: W, as it was multiplied.
    """

    values: Float[Tensor, "R D"]
    slope: Float[Tensor, "R D"] | float
    hidden: Float[Tensor, "R H"]
    weight: Float[Tensor, "D H"]


def head_logits(head: LinearHead, hidden: Float[Tensor, "R H"], temperature: float) -> HeadLogits:
    """``head.logits(hidden) / temperature``: the product in the head's precision, the rest in at least float32."""
    hidden = hidden.to(head.weight.dtype)
    values = torch.nn.functional.linear(hidden, head.weight)
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    slope: Tensor | float = head.scale / temperature
    if head.scale != 1.0:
        values = values * head.scale
    if head.bias is not None:
        values = values + head.bias
    if head.soft_cap is not None:
        bent = torch.tanh(values / head.soft_cap)
        values, slope = head.soft_cap * bent, slope * (1 - bent * bent)
    if temperature != 1.0:
        values = values / temperature
    return HeadLogits(values, slope, hidden, head.weight)


class TargetRows(NamedTuple):
    """The target's side of rows, shared by all depths.

    Attributes:
        logp: log p over the draft vocabulary, with the full-vocabulary denominator; may hold -inf.
        log_renormed: log p~, LOG_ZERO where p is 0.
        reachable: whether p has any mass there.
    """

    logp: Float[Tensor, "R D"]
    log_renormed: Float[Tensor, "R D"]
    reachable: Bool[Tensor, " R"]


def target_rows(logp: Float[Tensor, "R D"], log_coverage: Float[Tensor, " R"]) -> TargetRows:
    """From log p over the draft vocabulary and its logsumexp."""
    reachable = log_coverage > -torch.inf
    log_renormed = logp - log_coverage.masked_fill(~reachable, 0.0)[:, None]
    return TargetRows(logp, log_renormed.masked_fill_(log_renormed.isneginf(), LOG_ZERO), reachable)


class TextRows(NamedTuple):
    """What rows are measured against: target ids of argmax p and of the text's own token, and the coverage."""

    top1: Int[Tensor, " R"]
    tokens: Int[Tensor, " R"]
    coverage: Float[Tensor, " R"]


def row_stats(
    logq: Float[Tensor, "R D"], target: TargetRows, text: TextRows, vocab: DraftVocab
) -> dict[str, Float[Tensor, " R"]]:
    """The statistics as ``divergences.logit_stats`` defines them."""
    log_ratio = target.log_renormed - logq
    kl = (target.log_renormed.exp() * log_ratio).sum(-1)
    reverse_kl = -(logq.exp() * log_ratio).sum(-1)
    draft_ids = vocab.to_draft(text.tokens)
    at_token = draft_ids.clamp(min=0)[:, None]
    log_accept = (logq.gather(1, at_token) - target.logp.gather(1, at_token)).squeeze(1).clamp(max=0.0)
    proposed = vocab.to_target(logq.argmax(-1))
    return {
        "kl": kl,
        "reverse_kl": reverse_kl.masked_fill(~target.reachable, 0.0),
        "log_alpha": torch.minimum(logq, target.logp).logsumexp(-1).masked_fill(~target.reachable, LOG_ZERO),
        "accept_prob": log_accept.exp().masked_fill(draft_ids < 0, 0.0),
        "top1": (proposed == text.top1).to(logq.dtype),
        "hit": (proposed == text.tokens).to(logq.dtype),
        "coverage": text.coverage,
    }


def d_logits(
    logq: Float[Tensor, "R D"],
    target: TargetRows,
    stats: dict[str, Float[Tensor, " R"]],
    slopes: dict[str, Float[Tensor, " R"]],
) -> Float[Tensor, "R D"]:
    """d loss / dz from ``slopes``, d loss / d statistics; of ``stats`` it reads log_alpha and reverse_kl."""
    slope = {name: (value * target.reachable)[:, None] for name, value in slopes.items()}
    q = logq.exp()
    gradient = torch.zeros_like(q)
    if "kl" in slope:
        gradient += slope["kl"] * (q - target.log_renormed.exp())
    if "log_alpha" in slope:
        # Where q_v < p_v, q_v / alpha is at most 1 even if alpha underflows; elsewhere it only appears summed up.
        share = (logq - stats["log_alpha"][:, None]).masked_fill_(logq >= target.logp, -torch.inf).exp_()
        gradient += slope["log_alpha"] * (share - q * share.sum(-1, keepdim=True))
    if "reverse_kl" in slope:
        gradient += slope["reverse_kl"] * q * (logq - target.log_renormed - stats["reverse_kl"][:, None])
    return gradient
