"""The shared parts of draft layers, in float64 where they allow it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lkspec.drafts.layers import GatedMLP, Rope, attend

B, S, E = 2, 5, 6


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("num_own", [0, 1, 3])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (4, 2), (6, 2), (3, 1)])
def test_attend_is_attention_over_all_keys_at_once(num_heads: int, num_kv_heads: int, num_own: int) -> None:
    """A diagonal of own keys is S more keys, of which each query sees one."""
    num_keys = 7
    queries = draw(B, num_heads, S, E, seed=0)
    keys, values = draw(B, num_kv_heads, num_keys, E, seed=1), draw(B, num_kv_heads, num_keys, E, seed=2)
    own = tuple(
        (draw(B, num_kv_heads, S, E, seed=3 + i), draw(B, num_kv_heads, S, E, seed=9 + i)) for i in range(num_own)
    )
    mask = draw(B, 1, S, num_keys, seed=20) > 0
    mask[..., 0] = True
    whole_mask = torch.cat([mask, *[torch.eye(S, dtype=torch.bool).expand(B, 1, S, S)] * num_own], dim=-1)
    repeats = num_heads // num_kv_heads
    expected = torch.nn.functional.scaled_dot_product_attention(
        queries,
        torch.cat([keys, *[key for key, _ in own]], dim=2).repeat_interleave(repeats, dim=1),
        torch.cat([values, *[value for _, value in own]], dim=2).repeat_interleave(repeats, dim=1),
        attn_mask=whole_mask,
    )
    # The softmax itself runs in float32, whatever the inputs.
    torch.testing.assert_close(attend(queries, keys, values, mask, own), expected, rtol=1e-6, atol=1e-6)


def test_attend_to_own_keys_alone() -> None:
    """A query that sees no shared key sees its own."""
    queries, keys, values = draw(B, 4, S, E, seed=0), draw(B, 2, 3, E, seed=1), draw(B, 2, 3, E, seed=2)
    own_key, own_value = draw(B, 2, S, E, seed=3), draw(B, 2, S, E, seed=4)
    nothing = torch.zeros(B, 1, S, 3, dtype=torch.bool)
    mixed = attend(queries, keys, values, nothing, ((own_key, own_value),))
    torch.testing.assert_close(mixed, own_value.repeat_interleave(2, dim=1))


def test_attend_survives_large_scores() -> None:
    queries = 1e3 * draw(B, 4, S, E, seed=0).float()
    keys, values = 1e3 * draw(B, 2, 3, E, seed=1).float(), draw(B, 2, 3, E, seed=2).float()
    queries.requires_grad_()
    mixed = attend(
        queries,
        keys,
        values,
        torch.ones(B, 1, S, 3, dtype=torch.bool),
        ((keys[:, :, :1].expand(-1, -1, S, -1), values[:, :, :1].expand(-1, -1, S, -1)),),
    )
    mixed.sum().backward()
    assert mixed.isfinite().all()
    assert queries.grad.isfinite().all()


def test_rope_turns_pairs_of_halves() -> None:
    """Dimensions i and i + E/2 are a complex number that turns by position * inv_freq_i."""
    inv_freq = torch.tensor([1.0, 0.3, 0.01])
    heads, positions = draw(B, 3, S, E, seed=0).float(), torch.tensor([[0, 1, 2, 3, 4], [7, 7, 100, 3, 0]])
    turned = Rope(inv_freq, 0.9)(heads, positions)
    for b in range(B):
        for s in range(S):
            z = torch.complex(heads[b, :, s, :3].double(), heads[b, :, s, 3:].double())
            z = 0.9 * z * torch.exp(1j * positions[b, s] * inv_freq.double())
            torch.testing.assert_close(turned[b, :, s].double(), torch.cat([z.real, z.imag], -1), rtol=1e-5, atol=1e-5)


def test_rope_leaves_position_zero_and_the_dtype_alone() -> None:
    heads = draw(1, 2, 3, E, seed=0).bfloat16()
    turned = Rope(torch.ones(3), 1.0)(heads, torch.zeros(1, 3, dtype=torch.int64))
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, heads)


def test_rope_angles_at_large_positions_under_autocast() -> None:
    """bfloat16 holds no integer above 256 exactly: angles must not pass through it."""
    rope, heads = Rope(torch.tensor([1.0]), 1.0), torch.tensor([1.0, 0.0]).reshape(1, 1, 1, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        turned = rope(heads, torch.tensor([[8191]]))
    expected = torch.tensor([8191.0]).double()
    torch.testing.assert_close(
        turned.flatten().double(), torch.cat([expected.cos(), expected.sin()]), rtol=0, atol=5e-3
    )


def test_gated_mlp() -> None:
    mlp = GatedMLP(4, 7)
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    gate, up = x @ mlp.gate_proj.weight.T, x @ mlp.up_proj.weight.T
    torch.testing.assert_close(mlp(x), (gate * torch.sigmoid(gate) * up) @ mlp.down_proj.weight.T)
