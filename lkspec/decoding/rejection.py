"""Verification of one round of drafted tokens: lossless for every q (Leviathan et al. 2023, Algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lkspec.decoding.sampling import Sampling, invert_cdf
from lkspec.types import Proposal
from lkspec.vocab import DraftVocab


@dataclass(frozen=True)
class Verification:
    """What one round decided.

    Attributes:
        num_accepted: length of the accepted prefix of the K drafted tokens.
        bonus: the token after it, from norm(max(p - q, 0)) at the rejection or from p after K acceptances.
    """

    num_accepted: Int[Tensor, " B"]
    bonus: Int[Tensor, " B"]


def verify_greedy(drafted: Int[Tensor, "B K"], chosen: Int[Tensor, "B K1"]) -> Verification:
    """Accepts the drafted tokens that the target would have chosen itself.

    Args:
        drafted: tokens at depths 1..K.
        chosen: the target's argmax after 0..K of them.
    """
    num_accepted = (drafted == chosen[:, :-1]).int().cumprod(1).sum(1)
    return Verification(num_accepted=num_accepted, bonus=chosen.gather(1, num_accepted[:, None])[:, 0])


def verify_round(
    proposal: Proposal,
    logits: Float[Tensor, "B K1 V"],
    uniforms: Float[Tensor, "B K1"],
    vocab: DraftVocab,
    sampling: Sampling,
) -> Verification:
    """Accepts drafted token x at depth k while u_k < p_k(x) / q_k(x), then samples one more token.

    Depth by depth, with the rows that are still accepted: p is made only where it is looked at, which is at
    accepted + 1 of a row's K + 1 places, and no more than [B, V] of it at a time.

    Args:
        proposal: drafted tokens [B, K] and their distributions q [B, K, D].
        logits: the target's after 0..K drafted tokens.
        uniforms: one number in [0, 1) a depth and, last, one for the bonus token.
        vocab: places q in the target vocabulary.
        sampling: makes p of the logits; not greedy.
    """
    num_rows, num_depths = proposal.tokens.shape
    rows = torch.arange(num_rows, device=logits.device)
    num_accepted, bonus = torch.full_like(rows, num_depths), torch.empty_like(rows)
    for depth in range(num_depths):
        p, q = sampling.target_probs(logits[rows, depth]), proposal.probs[rows, depth]
        tokens = proposal.tokens[rows, depth, None]
        # u < p / q without the division, which q = 0 (possible after filters, by rounding) would spoil.
        threshold = uniforms[rows, depth] * q.gather(1, vocab.to_draft(tokens))[:, 0]
        accepted = threshold < p.gather(1, tokens)[:, 0]
        ended = rows[~accepted]
        num_accepted[ended] = depth
        bonus[ended] = invert_cdf(_residual(p[~accepted], vocab.expand(q[~accepted])), uniforms[ended, num_depths])
        rows = rows[accepted]
        if len(rows) == 0:
            break
    bonus[rows] = invert_cdf(sampling.target_probs(logits[rows, num_depths]), uniforms[rows, num_depths])
    return Verification(num_accepted=num_accepted, bonus=bonus)


def _residual(p: Float[Tensor, "B V"], q: Float[Tensor, "B V"]) -> Float[Tensor, "B V"]:
    """max(p - q, 0), unnormalised."""
    residual = (p - q).clamp_min(0.0)
    # p <= q everywhere means p = q up to rounding: a rejection has probability zero, p itself is the limit.
    return torch.where(residual.sum(-1, keepdim=True) > 0, residual, p)
