"""A draft that cannot tell n contexts apart proposes from one q in all of them: which q gets most accepted?

KL is least for the mean of the n targets. Their mean acceptance rate, which TV is one minus, is largest for a common
quantile instead: q_v is what p_v exceeds in a share c of the contexts, with one c for all tokens, such that q adds up
to one. A token that matters in fewer of them gets nothing, so that this q is sharper than the mean. How much of the
difference does the mean get back when it is served sharpened, q^s? Groups [G, n, V] stand for many such drafts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lkspec.losses.divergences import logit_stats
from lkspec.losses.objectives import Objective
from lkspec.types import TokenStats
from lkspec.vocab import DraftVocab

_NUM_STEPS = 200
_LEARNING_RATE = 0.2
_FLOOR = 1e-12  # of a probability whose logarithm is a logit


def zipf_contexts(
    num_groups: int, num_contexts: int, vocabulary_size: int, *, concentration: float, seed: int = 0
) -> Float[Tensor, "G n V"]:
    """Targets p ~ Dirichlet(concentration * Zipf's law): the smaller the concentration, the surer is each of them."""
    shares = 1.0 / torch.arange(1, vocabulary_size + 1, dtype=torch.float64)
    weights = (concentration * shares / shares.sum()).expand(num_groups, num_contexts, vocabulary_size)
    draws = torch._standard_gamma(weights, generator=torch.Generator().manual_seed(seed))
    return draws / draws.sum(-1, keepdim=True)


def acceptance(targets: Float[Tensor, "G n V"], drafts: Float[Tensor, "G V"]) -> Float[Tensor, " G"]:
    """Mean over contexts of sum_v min(p_v, q_v)."""
    return torch.minimum(targets, drafts[:, None]).sum(-1).mean(-1)


def agreement(targets: Float[Tensor, "G n V"], drafts: Float[Tensor, "G V"]) -> Float[Tensor, " G"]:
    """Share of the contexts whose most probable token is the draft's: what greedy decoding accepts."""
    return (targets.argmax(-1) == drafts.argmax(-1)[:, None]).double().mean(-1)


def best_draft(targets: Float[Tensor, "G n V"]) -> Float[Tensor, "G V"]:
    """The q of largest acceptance, exactly.

    Acceptance is concave in q, a sum over tokens of functions that are linear between the sorted values of p_v: up to
    the i-th smallest of n, more of q_v is accepted in n - i + 1 of the contexts. So tokens are filled up level by
    level, the most accepted first, until q adds up to one; the last level is filled in proportion.
    """
    levels = targets.sort(dim=1).values.diff(dim=1, prepend=torch.zeros_like(targets[:, :1]))
    before = levels.sum(-1).cumsum(1) - levels.sum(-1)
    share = ((1 - before) / levels.sum(-1).clamp(min=_FLOOR)).clamp(0, 1)
    return (levels * share[..., None]).sum(1)


def shared_draft(objective: Objective, targets: Float[Tensor, "G n V"]) -> Float[Tensor, "G V"]:
    """The q of each group that minimises an objective's mean over its contexts, by descent from their mean.

    Mean alpha, where the objective's weights follow it, is that of all groups.
    """
    num_groups, num_contexts, size = targets.shape
    logits = targets.mean(1).clamp(min=_FLOOR).log().requires_grad_()
    known = targets.clamp(min=_FLOOR).log().reshape(-1, size)
    token, vocab = torch.zeros(len(known), dtype=torch.int64), DraftVocab.full(size)
    optimizer = torch.optim.Adam([logits], lr=_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _NUM_STEPS)
    mask = torch.ones(1, num_groups, num_contexts, dtype=torch.bool)
    for _ in range(_NUM_STEPS):
        rows = logits[:, None].expand_as(targets).reshape(-1, size)
        found = logit_stats(rows, known, token, vocab, row_value=objective.row_value)
        stats = TokenStats(mask=mask, **{name: value.reshape(mask.shape) for name, value in found.items()})
        values = objective.values(stats, stats.log_alpha.detach().exp().mean()[None])
        optimizer.zero_grad()
        values.mean(-1).sum().backward()
        optimizer.step()
        schedule.step()
    return logits.detach().softmax(-1)


@dataclass(frozen=True)
class Sharpening:
    """The acceptance of drafts and what sharpness adds.

    Attributes:
        alpha: mean acceptance as they are.
        sharpness: the s of a grid at which q^s, renormalised, has the largest.
        sharpened: mean acceptance there.
    """

    alpha: float
    sharpness: float
    sharpened: float


def sharpening(targets: Float[Tensor, "G n V"], drafts: Float[Tensor, "G V"], grid: Sequence[float]) -> Sharpening:
    """Sharpens the drafts of all groups alike."""
    powers = {power: drafts**power for power in grid}
    found = {s: float(acceptance(targets, q / q.sum(-1, keepdim=True)).mean()) for s, q in powers.items()}
    best = max(found, key=found.__getitem__)
    return Sharpening(float(acceptance(targets, drafts).mean()), best, found[best])
