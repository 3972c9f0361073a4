"""Verification of one round of drafted tokens: lossless for every q (Leviathan et al. 2023, Algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lkspec.decoding.sampling import invert_cdf
from lkspec.types import Proposal
from lkspec.vocab import DraftVocab


@dataclass(frozen=True)
class Verdict:
    """What one round decided.

    Attributes:
        num_accepted: length of the accepted prefix of the K drafted tokens.
        bonus: the token after it, from norm(max(p - q, 0)) at the rejection or from p after K acceptances.
    """

    num_accepted: Int[Tensor, " B"]
    bonus: Int[Tensor, " B"]


def verify_round(
    proposal: Proposal,
    target_probs: Float[Tensor, "B K1 V"],
    uniforms: Float[Tensor, "B K1"],
    vocab: DraftVocab,
) -> Verdict:
    """Accepts drafted token x at depth k while u_k < p_k(x) / q_k(x), then samples one more token.

    Args:
        proposal: drafted tokens [B, K] and their distributions q [B, K, D].
        target_probs: p after 0..K drafted tokens, [B, K + 1, V]; one-hot rows make this greedy verification.
        uniforms: one number in [0, 1) a depth and, last, one for the bonus token.
        vocab: places q in the target vocabulary.
    """
    num_rows, num_depths = proposal.tokens.shape
    p_drafted = target_probs[:, :num_depths].gather(-1, proposal.tokens[..., None])[..., 0]
    q_drafted = proposal.probs.gather(-1, vocab.to_draft(proposal.tokens)[..., None])[..., 0]
    # u < p / q without the division, which q = 0 (possible after filters, by rounding) would spoil.
    accepted = uniforms[:, :num_depths] * q_drafted < p_drafted
    num_accepted = accepted.int().cumprod(1).sum(1)
    rows = torch.arange(num_rows, device=target_probs.device)
    final = target_probs[rows, num_accepted]
    rejected = num_accepted < num_depths
    if num_depths > 0:
        q_rejected = vocab.expand(proposal.probs[rows, num_accepted.clamp(max=num_depths - 1)])
        residual = (final - q_rejected).clamp_min(0.0)
        # p <= q everywhere means p = q up to rounding: a rejection has probability zero, p itself is the limit.
        usable = rejected & (residual.sum(-1) > 0)
        final = torch.where(usable[:, None], residual, final)
    return Verdict(num_accepted=num_accepted, bonus=invert_cdf(final, uniforms[:, num_depths]))
