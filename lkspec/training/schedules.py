"""Learning-rate schedules."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def cosine_with_warmup(
    optimizer: Optimizer,
    num_steps: int,
    *,
    max_warmup_steps: int = 100,
    warmup_share: float = 0.05,
    final_share: float = 0.0,
) -> LambdaLR:
    """Linear warm-up over min(max_warmup_steps, warmup_share * num_steps) steps, then half a cosine.

    ``final_share`` of the learning rate is left at ``num_steps``.
    """
    num_warmup = max(1, min(max_warmup_steps, round(warmup_share * num_steps)))

    def factor(step: int) -> float:
        if step < num_warmup:
            return (step + 1) / num_warmup
        progress = min(1.0, (step - num_warmup) / max(1, num_steps - num_warmup))
        return final_share + (1 - final_share) * 0.5 * (1 + math.cos(math.pi * progress))

    return LambdaLR(optimizer, factor)
