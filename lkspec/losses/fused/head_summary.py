"""Log-normaliser and argmax of the target's logits, kept with its states: their readers need little of the head."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from lkspec.losses.fused.logits import Logits, Scratch, logit_pieces, softmax_into
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


def summarise(
    pieces: Iterable[tuple[slice, Logits]],
    num_rows: int,
    scratch: Scratch,
    visit: Callable[[slice, Float[Tensor, "R w"]], object] | None = None,
) -> HeadSummary:
    """Normaliser and argmax over a vocabulary that comes in pieces; ``visit`` sees the logits of each."""
    normaliser = torch.full((num_rows,), -torch.inf, dtype=scratch.dtype, device=scratch.device)
    largest, argmax = normaliser.clone(), torch.zeros(num_rows, dtype=torch.int64, device=scratch.device)
    for columns, logits in pieces:
        values = logits.values(slice(0, num_rows), scratch.dtype)
        log_sum, best = softmax_into(values, scratch("whole", *values.shape))
        normaliser = torch.logaddexp(normaliser, log_sum)
        peak = values.gather(1, best[:, None]).squeeze(1)
        higher = ~(peak <= largest)  # NaN shall stay NaN
        largest, argmax = torch.where(higher, peak, largest), torch.where(higher, best + columns.start, argmax)
        if visit is not None:
            visit(columns, values)
    return HeadSummary(normaliser, argmax)
