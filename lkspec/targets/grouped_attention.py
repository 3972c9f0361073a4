"""Masked attention of several query tokens over grouped keys, without a copy of keys and values for every query head.

transformers repeats them for its sdpa attention wherever a mask is given and a row has more than one query token, which
is every verification; on a CPU that copy takes longer than the attention. Here the queries of a group's heads lie one
after another instead, under the same mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

_NAME = "lkspec_grouped_sdpa"  # the name under which transformers' layers find the attention below


@contextmanager
def grouped_sdpa(config: Any) -> Iterator[None]:
    """Within it a model of this configuration, whose attention is sdpa, attends as below; masks must be given."""
    before = config._attn_implementation
    config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = before


def _attention(
    module: nn.Module,
    query: Float[Tensor, "B N S E"],
    key: Float[Tensor, "B M L E"],
    value: Float[Tensor, "B M L F"],
    attention_mask: Bool[Tensor, "B 1 S L"],
    *,
    scaling: float,
    **options: Any,
) -> tuple[Float[Tensor, "B S N F"], None]:
    """softmax(scaling * Q K^T + mask) V, as transformers' sdpa attention computes it."""
    num_rows, num_heads, num_queries, head_dim = query.shape
    num_groups = num_heads // key.shape[1]
    if num_groups == 1 or any(options.get(name) is not None for name in ("softcap", "position_bias")):
        mixed: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **options
        )
        return mixed
    packed = query.reshape(num_rows, key.shape[1], num_groups * num_queries, head_dim)
    mask = attention_mask.repeat(1, 1, num_groups, 1)
    mixed_heads = torch.nn.functional.scaled_dot_product_attention(packed, key, value, attn_mask=mask, scale=scaling)
    return mixed_heads.reshape(num_rows, num_heads, num_queries, value.shape[-1]).transpose(1, 2), None


AttentionInterface.register(_NAME, _attention)
