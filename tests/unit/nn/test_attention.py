"""The definition of attention over shared and own keys, against one over all keys at once and loops in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lkspec.nn.attention import attend, attend_dense

B, S, E = 2, 5, 6
Own = tuple[tuple[Tensor, Tensor], ...]


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_inputs(
    num_heads: int, num_kv_heads: int, num_own: int, *, value_size: int = E
) -> tuple[Tensor, Tensor, Tensor, Tensor, Own]:
    """Queries, 7 shared keys and values, a mask that leaves each query at least one of them, and own entries."""
    own = tuple(
        (draw(B, num_kv_heads, S, E, seed=3 + i), draw(B, num_kv_heads, S, value_size, seed=9 + i))
        for i in range(num_own)
    )
    mask = draw(B, 1, S, 7, seed=20) > 0
    mask[..., 0] = True
    keys, values = draw(B, num_kv_heads, 7, E, seed=1), draw(B, num_kv_heads, 7, value_size, seed=2)
    return draw(B, num_heads, S, E, seed=0), keys, values, mask, own


def attend_by_loops(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor,
    own: Own,
    *,
    scaling: float,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """One query at a time, in float64."""
    num_heads, num_groups = queries.shape[1], keys.shape[1]
    mixed = torch.zeros(B, num_heads, S, values.shape[-1], dtype=torch.float64)
    for b in range(B):
        for n in range(num_heads):
            group = n // (num_heads // num_groups)
            for s in range(S):
                seen = [(keys[b, group, j], values[b, group, j]) for j in range(keys.shape[2]) if mask[b, 0, s, j]]
                seen += [(key[b, group, s], value[b, group, s]) for key, value in own]
                scores = [scaling * float(queries[b, n, s] @ key) for key, _ in seen]
                if soft_cap is not None:
                    scores = [soft_cap * math.tanh(score / soft_cap) for score in scores]
                total = sum(math.exp(score) for score in scores)
                if sinks is not None:
                    total += math.exp(float(sinks[n]))
                for score, (_, value) in zip(scores, seen, strict=True):
                    mixed[b, n, s] += math.exp(score) / total * value
    return mixed


@pytest.mark.parametrize("num_own", [0, 1, 3])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (4, 2), (6, 2), (3, 1)])
def test_attend_is_attention_over_all_keys_at_once(num_heads: int, num_kv_heads: int, num_own: int) -> None:
    """A diagonal of own keys is S more keys, of which each query sees one."""
    queries, keys, values, mask, own = make_inputs(num_heads, num_kv_heads, num_own)
    whole_mask = torch.cat([mask, *[torch.eye(S, dtype=torch.bool).expand(B, 1, S, S)] * num_own], dim=-1)
    repeats = num_heads // num_kv_heads
    expected = torch.nn.functional.scaled_dot_product_attention(
        queries,
        torch.cat([keys, *[key for key, _ in own]], dim=2).repeat_interleave(repeats, dim=1),
        torch.cat([values, *[value for _, value in own]], dim=2).repeat_interleave(repeats, dim=1),
        attn_mask=whole_mask,
    )
    torch.testing.assert_close(attend_dense(queries, keys, values, mask, own), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("num_own", [0, 2])
@pytest.mark.parametrize("value_size", [E, 4, 9])
@pytest.mark.parametrize("with_sinks", [False, True], ids=["no_sinks", "sinks"])
@pytest.mark.parametrize("soft_cap", [None, 0.7])
@pytest.mark.parametrize("scaling", [None, 0.9])
def test_attend_is_the_loops(
    scaling: float | None, soft_cap: float | None, with_sinks: bool, value_size: int, num_own: int
) -> None:
    """A sink is one score a head, not scaled and not capped; values may be narrower or wider than keys."""
    inputs = make_inputs(6, 2, num_own, value_size=value_size)
    sinks = draw(6, seed=30) if with_sinks else None
    expected = attend_by_loops(*inputs, scaling=scaling or E**-0.5, soft_cap=soft_cap, sinks=sinks)
    mixed = attend_dense(*inputs, scaling=scaling, soft_cap=soft_cap, sinks=sinks)
    assert mixed.shape == (B, 6, S, value_size)
    torch.testing.assert_close(mixed, expected, rtol=1e-12, atol=1e-12)


def test_a_large_sink_takes_everything_and_a_small_one_nothing() -> None:
    inputs = make_inputs(6, 2, 1)
    without = attend_dense(*inputs)
    assert float(without.abs().max()) > 1
    assert float(attend_dense(*inputs, sinks=torch.full((6,), 60.0)).abs().max()) < 1e-12
    torch.testing.assert_close(attend_dense(*inputs, sinks=torch.full((6,), -60.0)), without)


def test_attend_to_own_keys_alone() -> None:
    """A query that sees no shared key sees its own."""
    queries, keys, values, mask, ((own_key, own_value),) = make_inputs(4, 2, 1)
    mixed = attend_dense(queries, keys, values, torch.zeros_like(mask), ((own_key, own_value),))
    torch.testing.assert_close(mixed, own_value.repeat_interleave(2, dim=1))


def test_a_sink_is_enough_to_see() -> None:
    """Where nothing else is visible the result is zero, not NaN."""
    queries, keys, values, mask, _ = make_inputs(4, 2, 0)
    mixed = attend_dense(queries, keys, values, torch.zeros_like(mask), sinks=torch.zeros(4))
    assert torch.equal(mixed, torch.zeros_like(mixed))


def test_gradients_are_those_of_one_wide_softmax() -> None:
    queries, keys, values, mask, own = make_inputs(4, 2, 2)
    leaves = [part.requires_grad_() for part in (queries, keys, values, draw(4, seed=30), *own[0], *own[1])]
    sinks = leaves[3]
    mixed = attend_dense(queries, keys, values, mask, own, scaling=0.4, soft_cap=2.0, sinks=sinks)
    all_keys = torch.cat([keys, own[0][0], own[1][0]], dim=2).repeat_interleave(2, dim=1)
    all_values = torch.cat([values, own[0][1], own[1][1]], dim=2).repeat_interleave(2, dim=1)
    scores = 2.0 * torch.tanh(0.4 * queries @ all_keys.transpose(-1, -2) / 2.0)
    diagonal = torch.eye(S, dtype=torch.bool).expand(B, 1, S, S)
    scores = scores.masked_fill(~torch.cat([mask, diagonal, diagonal], dim=-1), -torch.inf)
    scores = torch.cat([scores, sinks[:, None, None].expand(B, 4, S, 1)], dim=-1)
    expected = scores.softmax(-1)[..., :-1] @ all_values
    direction = draw(*expected.shape, seed=31)
    gradients = torch.autograd.grad((mixed * direction).sum(), leaves)
    for got, wanted in zip(gradients, torch.autograd.grad((expected * direction).sum(), leaves), strict=True):
        assert float(wanted.abs().max()) > 0.1
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_attend_survives_large_scores() -> None:
    queries = 1e3 * draw(B, 4, S, E, seed=0).float()
    keys, values = 1e3 * draw(B, 2, 3, E, seed=1).float(), draw(B, 2, 3, E, seed=2).float()
    queries.requires_grad_()
    own = ((keys[:, :, :1].expand(-1, -1, S, -1), values[:, :, :1].expand(-1, -1, S, -1)),)
    mixed = attend_dense(queries, keys, values, torch.ones(B, 1, S, 3, dtype=torch.bool), own)
    mixed.sum().backward()
    assert mixed.isfinite().all()
    assert queries.grad.isfinite().all()


def test_bfloat16_scores_are_mixed_in_float32() -> None:
    """Values keep their type; the softmax over many equal scores still sums to 1."""
    num_keys = 600
    queries = torch.zeros(1, 1, 1, E, dtype=torch.bfloat16)
    keys = torch.ones(1, 1, num_keys, E, dtype=torch.bfloat16)
    values = torch.ones(1, 1, num_keys, E, dtype=torch.bfloat16)
    mixed = attend_dense(queries, keys, values, torch.ones(1, 1, 1, num_keys, dtype=torch.bool))
    assert mixed.dtype == torch.bfloat16
    torch.testing.assert_close(mixed.float(), torch.ones(1, 1, 1, E), rtol=0, atol=1e-2)


@pytest.mark.parametrize("num_own", [0, 2])
@pytest.mark.parametrize("with_sinks", [False, True], ids=["no_sinks", "sinks"])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (6, 2)])
def test_attend_under_a_mask_that_is_a_tensor(
    num_heads: int, num_kv_heads: int, with_sinks: bool, num_own: int
) -> None:
    """As decoding calls it, one query or several at a time."""
    queries, keys, values, mask, own = make_inputs(num_heads, num_kv_heads, num_own)
    sinks = draw(num_heads, seed=30) if with_sinks else None
    whole = attend_dense(queries, keys, values, mask, own, scaling=0.3, sinks=sinks)
    torch.testing.assert_close(attend(queries, keys, values, mask, own, scaling=0.3, sinks=sinks), whole)
    for s in range(S):
        one = tuple((key[:, :, s, None], value[:, :, s, None]) for key, value in own)
        query = queries[:, :, s, None]
        mixed = attend(query, keys, values, mask[:, :, s, None], one, scaling=0.3, sinks=sinks)
        torch.testing.assert_close(mixed, whole[:, :, s, None])
