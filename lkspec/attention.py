"""Attention over keys shared by a row and, besides, over keys of each query's own (training-time test)."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def attend(
    queries: Float[Tensor, "B N S E"],
    keys: Float[Tensor, "B M L E"],
    values: Float[Tensor, "B M L F"],
    mask: Bool[Tensor, "B 1 S L"],
    own: tuple[tuple[Float[Tensor, "B M S E"], Float[Tensor, "B M S F"]], ...] = (),
    *,
    scaling: float | None = None,
    soft_cap: float | None = None,
    sinks: Float[Tensor, " N"] | None = None,
) -> Float[Tensor, "B N S F"]:
    """Grouped-query attention to masked keys and, besides, of each query to one key of its own per entry of ``own``.

    softmax over scaling * [q K^T | q k_own_1 | ...]: the entries of ``own`` are a diagonal (slot s of a query only
    meets slot s of an own key), so a depth of the training-time test costs S, not S^2, more scores.

    Args:
        scaling: 1 / sqrt(E) unless given.
        soft_cap: scores become soft_cap * tanh(scores / soft_cap).
        sinks: one more score a head, which takes its share of the softmax and has no value.
    """
    num_rows, num_heads, num_queries, head_dim = queries.shape
    num_groups = keys.shape[1]
    grouped = queries.reshape(num_rows, num_groups, num_heads // num_groups, num_queries, head_dim)
    shared = (grouped @ keys[:, :, None].transpose(-1, -2)).float()
    diagonal = [(grouped * key[:, :, None]).sum(-1, keepdim=True).float() for key, _ in own]
    scores = torch.cat([shared, *diagonal], dim=-1) * (head_dim**-0.5 if scaling is None else scaling)
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    num_keys = keys.shape[2]
    visible = torch.nn.functional.pad(mask[:, :, None], (0, len(own)), value=True)
    scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        sink = sinks.float().view(1, num_groups, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sink], dim=-1)
    weights = torch.softmax(scores, dim=-1).to(values.dtype)
    mixed = weights[..., :num_keys] @ values[:, :, None]
    for index, (_, value) in enumerate(own):
        mixed = mixed + weights[..., num_keys + index, None] * value[:, :, None]
    return mixed.reshape(num_rows, num_heads, num_queries, values.shape[-1])
