"""What the target's logits come to, made once where states are kept: whoever reads those spares most of the head."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lkspec.losses.fused.chunks import logit_pieces
from lkspec.losses.fused.scratch import Scratch
from lkspec.losses.fused.target_rows import summarise
from lkspec.types import HeadSummary, LinearHead

_ROWS = 512  # whose logits are alive together


@torch.no_grad()
def head_summary(head: LinearHead, hidden: Float[Tensor, "*slots H"]) -> HeadSummary:
    """``log_normaliser = log sum_v exp z_v`` and ``argmax = argmax_v z_v`` of ``z = head.logits(hidden)``.

    Args:
        head: the target's.
        hidden: its last hidden states.
    """
    scratch = Scratch(hidden.device, torch.promote_types(head.weight.dtype, torch.float32))
    parts = hidden.flatten(0, -2).split(_ROWS)
    found = [summarise(logit_pieces(part, head, 1.0, scratch), len(part), scratch) for part in parts]
    normaliser = torch.cat([part.log_normaliser for part in found])
    return HeadSummary(normaliser.view(hidden.shape[:-1]), torch.cat([p.argmax for p in found]).view(hidden.shape[:-1]))
