"""Attention without repeated keys gives what transformers' own sdpa attention gives."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lkspec.targets import grouped_attention
from lkspec.targets.grouped_attention import grouped_sdpa

ROWS, QUERIES, KEYS, WIDTH = 3, 4, 9, 8


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(6, 2), (4, 1), (4, 4)])
@pytest.mark.parametrize("value_width", [WIDTH, 2 * WIDTH])
def test_equals_transformers(num_heads: int, num_kv_heads: int, value_width: int):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(ROWS, num_heads, QUERIES, WIDTH, generator=generator)
    key = torch.randn(ROWS, num_kv_heads, KEYS, WIDTH, generator=generator)
    value = torch.randn(ROWS, num_kv_heads, KEYS, value_width, generator=generator)
    mask = torch.rand(ROWS, 1, QUERIES, KEYS, generator=generator) > 0.4
    mask[..., 0] = True
    layer = SimpleNamespace(num_key_value_groups=num_heads // num_kv_heads, is_causal=True)
    ours, _ = grouped_attention._attention(layer, query, key, value, mask, scaling=0.3, dropout=0.0)
    theirs, _ = sdpa_attention_forward(layer, query, key, value, mask, scaling=0.3, dropout=0.0)
    assert ours.shape == theirs.shape
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_the_model_attends_as_before_afterwards():
    config = SimpleNamespace(_attn_implementation="sdpa")
    with grouped_sdpa(config):
        assert config._attn_implementation != "sdpa"
    assert config._attn_implementation == "sdpa"
