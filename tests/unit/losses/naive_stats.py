"""Statistics of (p, q) written out naively, in float64 and in the probability domain: what the package must equal."""

from __future__ import annotations

import torch
from torch import Tensor

from lkspec.vocab import DraftVocab


def naive_stats(
    draft_logits: Tensor, target_logits: Tensor, token: int, vocab: DraftVocab, temperature: float = 1.0
) -> dict[str, Tensor]:
    """Statistics of ONE row, differentiable in the draft logits while no probability underflows."""
    p = torch.softmax(target_logits.double() / temperature, 0)
    q = torch.softmax(draft_logits.double() / temperature, 0)
    ids = vocab.ids.tolist()
    p_inside = p[ids]
    p_renormed = p_inside / p_inside.sum()
    draft_id = ids.index(token) if token in ids else None
    best_draft = ids[int(q.argmax())]
    zero = q.new_zeros(())
    return {
        "kl": sum((p_renormed[v] * (p_renormed[v] / q[v]).log() for v in range(len(ids)) if p_renormed[v] > 0), zero),
        "reverse_kl": (q * (q / p_renormed).log()).sum(),
        "log_alpha": torch.minimum(p_inside, q).sum().log(),
        "accept_prob": zero if draft_id is None else (q[draft_id] / p_inside[draft_id]).clamp(max=1),
        "top1": zero + float(best_draft == int(p.argmax())),
        "hit": zero + float(best_draft == token),
        "coverage": p_inside.sum(),
    }


def lk_gradient(p_inside: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """(alpha, q (M - m)): d alpha / d z_q, with p over the draft vocabulary but not renormalised."""
    below = (q < p_inside).to(q.dtype)
    return torch.minimum(p_inside, q).sum(), q * (below - (q * below).sum())
