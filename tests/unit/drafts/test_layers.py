"""The shared parts of draft layers, in float64 where they allow it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.eagle3_reference import SOME, V, make_spec
from torch import Tensor

from lkspec.drafts.base import UnrollOptions
from lkspec.drafts.layers import (
    GatedDown,
    GatedMLP,
    RMSNorm,
    Rope,
    as_multiplied,
    init_head,
    rotate,
    shifted,
    visible_anchors,
)
from lkspec.types import Batch
from lkspec.vocab import DraftVocab

B, S, E = 2, 5, 6


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_rope_turns_pairs_of_halves() -> None:
    """Dimensions i and i + E/2 are a complex number that turns by position * inv_freq_i."""
    inv_freq = torch.tensor([1.0, 0.3, 0.01])
    heads, positions = draw(B, 3, S, E, seed=0).float(), torch.tensor([[0, 1, 2, 3, 4], [7, 7, 100, 3, 0]])
    turned = rotate(heads, Rope(inv_freq, 0.9)(positions, heads.dtype))
    for b in range(B):
        for s in range(S):
            z = torch.complex(heads[b, :, s, :3].double(), heads[b, :, s, 3:].double())
            z = 0.9 * z * torch.exp(1j * positions[b, s] * inv_freq.double())
            torch.testing.assert_close(turned[b, :, s].double(), torch.cat([z.real, z.imag], -1), rtol=1e-5, atol=1e-5)


def test_rope_leaves_position_zero_and_the_dtype_alone() -> None:
    heads = draw(1, 2, 3, E, seed=0).bfloat16()
    turned = rotate(heads, Rope(torch.ones(3), 1.0)(torch.zeros(1, 3, dtype=torch.int64), heads.dtype))
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, heads)


def test_rope_angles_at_large_positions_under_autocast() -> None:
    """bfloat16 holds no integer above 256 exactly: angles must not pass through it."""
    rope, heads = Rope(torch.tensor([1.0]), 1.0), torch.tensor([1.0, 0.0]).reshape(1, 1, 1, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        turned = rotate(heads, rope(torch.tensor([[8191]]), heads.dtype))
    expected = torch.tensor([8191.0]).double()
    torch.testing.assert_close(
        turned.flatten().double(), torch.cat([expected.cos(), expected.sin()]), rtol=0, atol=5e-3
    )


def test_gated_mlp() -> None:
    mlp = GatedMLP(4, 7)
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    gate, up = x @ mlp.gate_proj.weight.T, x @ mlp.up_proj.weight.T
    torch.testing.assert_close(mlp(x), (gate * torch.sigmoid(gate) * up) @ mlp.down_proj.weight.T)


def test_gated_down_is_the_second_half_of_it() -> None:
    gate_up, down = draw(2, 3, 14, seed=0).requires_grad_(), draw(4, 7, seed=1).requires_grad_()
    gate, up = gate_up[..., :7], gate_up[..., 7:]
    expected = (gate * torch.sigmoid(gate) * up) @ down.T
    torch.testing.assert_close(GatedDown.apply(gate_up, down), expected)
    assert torch.autograd.gradcheck(GatedDown.apply, (gate_up, down))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rms_norm(dtype: torch.dtype) -> None:
    """The result has the input's type, gradients their own; sums run in at least float32."""
    norm = RMSNorm(5, eps=1e-2).to(torch.promote_types(dtype, torch.float32))
    hidden = draw(2, 3, 5, seed=0).to(dtype).requires_grad_()
    direction = draw(2, 3, 5, seed=1)
    with torch.no_grad():
        norm.weight.copy_(draw(5, seed=2))
    result = norm(hidden)
    found = torch.autograd.grad(result, (hidden, norm.weight), direction.to(dtype))
    exact, weight = (tensor.detach().double().requires_grad_() for tensor in (hidden, norm.weight))
    expected = exact / (exact.square().mean(-1, keepdim=True) + 1e-2).sqrt() * weight
    wanted = torch.autograd.grad(expected, (exact, weight), direction)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    assert result.dtype == found[0].dtype == dtype
    assert found[1].dtype == norm.weight.dtype
    for got, right in zip((result, *found), (expected, *wanted), strict=True):
        torch.testing.assert_close(got.double(), right, rtol=tolerance, atol=tolerance)


def test_weights_as_they_are_multiplied() -> None:
    weight = torch.ones(2, 3)
    assert as_multiplied(weight) is weight
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert as_multiplied(weight).dtype == torch.bfloat16


@pytest.mark.parametrize("vocab", [SOME, DraftVocab.full(V)], ids=["truncated", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_from_the_target(vocab: DraftVocab, dtype: torch.dtype) -> None:
    """Rows of the draft vocabulary, times the scale of the target's head, in the draft's own precision and memory."""
    spec = make_spec(scale=0.5, dtype=dtype)
    weight = torch.nn.Parameter(torch.zeros(vocab.size, 16))
    init_head(weight, spec, vocab, "target", std=1.0)
    for row, target_id in enumerate(vocab.ids.tolist()):
        assert torch.equal(weight[row], 0.5 * spec.head.weight[target_id].float())
    assert weight.dtype == torch.float32
    assert weight.requires_grad
    weight.data.zero_()
    assert float(spec.head.weight.abs().sum()) > 0


def test_random_head() -> None:
    """Independent of the target: its bias and width do not matter."""
    weight = torch.zeros(500, 40)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        init_head(weight, make_spec(bias=True), DraftVocab.full(V), "random", std=0.3)
    assert float(weight.std()) == pytest.approx(0.3, rel=0.05)
    assert float(weight.mean()) == pytest.approx(0.0, abs=0.01)


def test_heads_that_are_refused() -> None:
    weight, vocab = torch.zeros(SOME.size, 16), SOME
    with pytest.raises(ValueError, match=r"draft\.head_init: expected 'target' or 'random', got 'zeros'"):
        init_head(weight, make_spec(), vocab, "zeros", std=1.0)
    with pytest.raises(ValueError, match=r"draft\.head_init=target: the target's head has a bias"):
        init_head(weight, make_spec(bias=True), vocab, "target", std=1.0)
    with pytest.raises(ValueError, match=r"reads 16 features, this draft's 12; .* draft\.head_init=random"):
        init_head(torch.zeros(SOME.size, 12), make_spec(), vocab, "target", std=1.0)
    soft_capped = replace(make_spec().head, soft_cap=30.0)
    init_head(weight, replace(make_spec(), head=soft_capped), vocab, "target", std=1.0)  # the cap alone is no obstacle
    assert torch.equal(weight, make_spec().head.weight[SOME.ids])


@pytest.mark.parametrize("offset", range(1, 8))
def test_shifted(offset: int) -> None:
    tokens = torch.arange(10, 20).reshape(2, 5)
    moved = shifted(tokens, offset)
    expected = [[int(row[t + offset]) if t + offset < 5 else 0 for t in range(5)] for row in tokens]
    assert moved.tolist() == expected
    assert tokens.tolist() == torch.arange(10, 20).reshape(2, 5).tolist()


def test_visible_anchors() -> None:
    """The same conversation, not later: numbered from 1, padding is 0 and sees only padding."""
    segments = torch.tensor([[1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1]])
    filler = torch.zeros_like(segments)
    batch = Batch(filler, filler, segments, filler, (("a", "b"), ("c",)))
    visible = visible_anchors(batch, UnrollOptions()).dense()
    assert visible.shape == (2, 1, 6, 6)
    for row in range(2):
        for query in range(6):
            for key in range(6):
                same = segments[row, query] == segments[row, key]
                assert bool(visible[row, 0, query, key]) == bool(same and key <= query)
    assert visible.diagonal(dim1=-2, dim2=-1).all(), "no query is left without a key"
