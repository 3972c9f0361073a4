"""Statistics of (target p, draft q) pairs: the readable form, on logits, that every faster form must agree with.

One primitive serves every objective (contract 3): kl, reverse_kl and log_alpha carry gradients to the draft, the
others are for measuring. All names and shapes are those of ``TokenStats``; shape letters are those of ``types.py``.

What infinities mean here: a target logit may be -inf (p_v = 0, e.g. a point mass or a filtered target). Nothing is
NaN then, and every loss and gradient stays finite; where the true value is infinite (reverse KL against p~_v = 0, and
-log alpha of a row with no target mass inside the draft vocabulary), log 0 counts as ``LOG_ZERO``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lkspec.losses.target_filter import TargetFilter
from lkspec.vocab import DraftVocab

#: Stands for log 0 where a finite number is needed: its exp is 0 in float32 and in float64.
LOG_ZERO = -1e4

#: A form (b) objective: (logp, logq) [*rows, D] -> [*rows]; p has its full-vocabulary denominator and may hold -inf.
RowValue = Callable[[Float[Tensor, "*rows D"], Float[Tensor, "*rows D"]], Float[Tensor, "*rows"]]


def logit_stats(
    draft_logits: Float[Tensor, "*rows D"],
    target_logits: Float[Tensor, "*rows V"],
    tokens: Int[Tensor, "*rows"],
    vocab: DraftVocab,
    *,
    temperature: float | Float[Tensor, "*rows"] = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    row_value: RowValue | None = None,
) -> dict[str, Float[Tensor, "*rows"]]:
    """Statistics of rows of logits, by the names of ``TokenStats`` fields (``row_value`` only where one is given).

    With ``p = softmax(filtered(z_p / temperature))`` over V, ``p~`` = p restricted to D and renormalised, and
    ``q = softmax(z_q / temperature)`` over D::

        kl = sum_D p~ (log p~ - log q)                  reverse_kl = sum_D q (log q - log p~)
        log_alpha = logsumexp_D min(log p, log q)       accept_prob = min(1, q(x) / p(x)), 0 for x outside D
        top1 = [argmax q is argmax p]                   hit = [argmax q is x]
        coverage = sum_D p

    Computed in float32 or the logits' own wider type; no gradient reaches the target. Where p_v = q_v exactly, the
    gradient of log_alpha takes min(p_v, q_v) to be p_v, as in ``M_v = 1[q_v < p_v]``. A row whose target has no mass
    in D at all gives kl = reverse_kl = 0 and log_alpha = LOG_ZERO, with zero gradient.

    Args:
        draft_logits: z_q, over the draft vocabulary.
        target_logits: z_p, over the target vocabulary; -inf allowed.
        tokens: the text's own token x, as target ids.
        vocab: which target tokens the draft can propose.
        temperature: divides both logits; a tensor has one a row.
        top_k, top_p: filter p alone, see ``TargetFilter``.
        row_value: a form (b) objective.

    Raises:
        ValueError: a temperature that is not positive or not one a row, top_k or top_p out of range.
    """
    check_temperature(temperature, tokens)
    with torch.no_grad():
        target_logits = TargetFilter(top_k, top_p)(_tempered(target_logits, temperature))
        logp = vocab.restrict(target_logits) - target_logits.logsumexp(-1, keepdim=True)
        log_coverage = logp.logsumexp(-1)
    logq = _tempered(draft_logits, temperature).log_softmax(-1)
    at_token = vocab.to_draft(tokens).clamp(min=0)[..., None]
    log_accept = (logq.gather(-1, at_token) - logp.gather(-1, at_token)).squeeze(-1)
    stats = row_divergences(logq, logp, log_coverage)
    stats |= text_stats(log_accept, logq.argmax(-1), target_logits.argmax(-1), tokens, vocab)
    stats["coverage"] = log_coverage.exp()
    if row_value is not None:
        stats["row_value"] = row_value(logp, logq)
    return stats


def row_divergences(
    logq: Float[Tensor, "*rows D"], logp: Float[Tensor, "*rows D"], log_coverage: Float[Tensor, "*rows"]
) -> dict[str, Float[Tensor, "*rows"]]:
    """The statistics that carry gradients: the definition, exact at any distance of p and q."""
    reachable = log_coverage > -torch.inf
    log_renormed = (logp - log_coverage.masked_fill(~reachable, 0.0)[..., None]).clamp(min=LOG_ZERO)
    log_ratio = log_renormed - logq
    # `where`, not `minimum`, whose gradient splits ties; it also keeps a row of -inf from sending NaN to logq.
    log_overlap = torch.where(logq < logp, logq, logp)
    return {
        "kl": (log_renormed.exp() * log_ratio).sum(-1).masked_fill(~reachable, 0.0),
        "reverse_kl": -(logq.exp() * log_ratio).sum(-1).masked_fill(~reachable, 0.0),
        "log_alpha": log_overlap.logsumexp(-1).masked_fill(~reachable, LOG_ZERO),
    }


def text_stats(
    log_accept: Float[Tensor, "*rows"],
    proposed: Int[Tensor, "*rows"],
    target_top1: Int[Tensor, "*rows"],
    tokens: Int[Tensor, "*rows"],
    vocab: DraftVocab,
) -> dict[str, Float[Tensor, "*rows"]]:
    """The statistics that only measure, from log(q(x) / p(x)), the draft id of argmax q, and target ids."""
    proposed = vocab.to_target(proposed)
    return {
        "accept_prob": log_accept.clamp(max=0.0).exp().masked_fill(vocab.to_draft(tokens) < 0, 0.0),
        "top1": (proposed == target_top1).to(log_accept.dtype),
        "hit": (proposed == tokens).to(log_accept.dtype),
    }


def _tempered(
    logits: Float[Tensor, "*rows W"], temperature: float | Float[Tensor, "*rows"]
) -> Float[Tensor, "*rows W"]:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits / (temperature[..., None].to(logits) if isinstance(temperature, Tensor) else temperature)


def check_temperature(temperature: float | Tensor, tokens: Int[Tensor, "*rows"]) -> None:
    """Refuses what no logits can be divided by.

    Raises:
        ValueError: a temperature that is not positive, or neither one number nor one for each of the tokens.
    """
    values = torch.as_tensor(temperature)
    if values.dim() > 0 and values.shape != tokens.shape:
        raise ValueError(f"temperature: expected one number or {tuple(tokens.shape)}, got {tuple(values.shape)}")
    if not (values > 0).all():
        raise ValueError(
            f"temperature: expected positive numbers, got {values.min():g}; T = 0 is what top1 and hit measure"
        )
