"""Attention under a CausalMask: the same as the definition with the mask written out, at memory linear in S."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lkspec.nn.attention import CausalMask, Unrolled, attend, attend_dense
from lkspec.nn.flash import check_kernel

N, M, E = 6, 2, 4
PACKED = [[1] * 5 + [2] * 9 + [3] + [0] * 4, [1] * 19]
DOCUMENTS = {"one": [[1] * 11], "rows": [[1] * 7] * 3, "packed": PACKED}


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@dataclass
class Inputs:
    """Queries, shared and own entries and sinks of a mask's shape, and a direction to differentiate along."""

    mask: CausalMask
    num_own: int
    value_size: int = E
    num_heads: int = N

    def __post_init__(self) -> None:
        rows, slots = self.mask.documents.shape
        shapes = [(rows, self.num_heads, slots, E), (rows, M, slots, E), (rows, M, slots, self.value_size)]
        self.tensors = [draw(*shape, seed=i) for i, shape in enumerate(shapes + shapes[1:] * self.num_own)]
        self.sinks = draw(self.num_heads, seed=30)
        self.direction = draw(rows, self.num_heads, slots, self.value_size, seed=31)

    def run(self, how: Any, *, with_sinks: bool = False, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
        """The result and the gradients of everything."""
        leaves = [tensor.to(dtype).requires_grad_() for tensor in (*self.tensors, self.sinks)]
        queries, keys, values, *rest, sinks = leaves
        own = tuple(zip(rest[::2], rest[1::2], strict=True))
        mask = self.mask.dense() if how is attend_dense else self.mask
        mixed = how(queries, keys, values, mask, own, sinks=sinks if with_sinks else None, **options)
        used = leaves if with_sinks else leaves[:-1]
        return mixed, *torch.autograd.grad(mixed, used, self.direction.to(dtype))


def check_equal(inputs: Inputs, *, tolerance: float = 1e-12, **options: Any) -> None:
    found, expected = inputs.run(attend, **options), inputs.run(attend_dense, **options)
    assert len(found) == len(expected)
    for got, wanted in zip(found, expected, strict=True):
        assert float(wanted.detach().abs().max()) > 0.1
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("ahead", [0, 2])
def test_the_mask_by_its_definition(window: int | None, ahead: int) -> None:
    """A query ``ahead`` positions behind slot s sees the last ``window`` positions up to its own."""
    documents = torch.tensor(PACKED)
    dense = replace(CausalMask.of(documents, window=window), ahead=ahead).dense()
    assert dense.shape == (2, 1, 19, 19)
    for row in range(2):
        for query in range(19):
            for key in range(19):
                near = window is None or query + ahead - key < window
                same = documents[row, query] == documents[row, key]
                assert bool(dense[row, 0, query, key]) == bool(same and key <= query and near)


def test_part_of_a_mask() -> None:
    mask = CausalMask.of(torch.tensor(PACKED), window=4)
    assert torch.equal(mask.dense(slice(3, 9), slice(2, 7)), mask.dense()[:, :, 3:9, 2:7])


@pytest.mark.parametrize("name", DOCUMENTS)
@pytest.mark.parametrize("window", [None, 5])
def test_no_query_of_a_block_sees_a_key_before_the_first(name: str, window: int | None) -> None:
    mask = replace(CausalMask.of(torch.tensor(DOCUMENTS[name]), window=window), ahead=1)
    for query in range(mask.documents.shape[1]):
        seen = mask.dense()[:, 0, query:].any(1).any(0)
        first = mask.first_key(query)
        assert not seen[:first].any()
        assert first <= query


@pytest.mark.parametrize("kernel", ["auto", "blocks"])
@pytest.mark.parametrize("with_sinks", [False, True], ids=["no_sinks", "sinks"])
@pytest.mark.parametrize("num_own", [0, 1, 3])
@pytest.mark.parametrize("documents", DOCUMENTS.values(), ids=DOCUMENTS)
def test_values_and_gradients_are_the_definitions(
    documents: list[list[int]], num_own: int, with_sinks: bool, kernel: str
) -> None:
    mask = CausalMask.of(torch.tensor(documents), kernel=kernel)
    check_equal(Inputs(mask, num_own), with_sinks=with_sinks, scaling=0.7)


@pytest.mark.parametrize("num_heads", [2, 4, 8])
def test_any_number_of_heads_a_key(num_heads: int) -> None:
    check_equal(Inputs(CausalMask.of(torch.tensor(PACKED)), 2, num_heads=num_heads))


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("soft_cap", [None, 0.9])
@pytest.mark.parametrize("value_size", [E, 3, 7])
def test_what_no_kernel_has(
    monkeypatch: pytest.MonkeyPatch, value_size: int, soft_cap: float | None, window: Any
) -> None:
    """Windows, soft caps and values of another width than keys, over several blocks of queries."""
    monkeypatch.setattr("lkspec.nn.attention._BLOCK", 4)
    mask = replace(CausalMask.of(torch.tensor(PACKED), window=window), ahead=2 if window else 0)
    # A window that a query stands ahead of leaves it its own entries, and the sink.
    check_equal(Inputs(mask, 2, value_size=value_size), soft_cap=soft_cap, with_sinks=True)


@pytest.mark.parametrize("num_slots", [31, 257, 600])
def test_more_slots_than_a_block(num_slots: int) -> None:
    documents = torch.tensor([[1] * (num_slots // 3) + [2] * (num_slots - num_slots // 3)])
    for kernel in ("auto", "blocks"):
        check_equal(Inputs(CausalMask.of(documents, kernel=kernel), 1), tolerance=1e-11)


def test_float32_at_scores_in_the_hundreds() -> None:
    """The merge does not overflow, and loses no more than a log-sum-exp of that size is rounded by."""
    inputs = Inputs(CausalMask.of(torch.tensor(PACKED)), 2)
    inputs.tensors[0] = 100 * inputs.tensors[0]
    exact = inputs.run(attend_dense)
    for got, wanted in zip(inputs.run(attend, dtype=torch.float32), exact, strict=True):
        assert got.isfinite().all()
        assert float((got - wanted).detach().norm() / wanted.detach().norm()) < 1e-4


@pytest.mark.parametrize("kernel", ["auto", "blocks"])
def test_bfloat16(kernel: str) -> None:
    inputs = Inputs(CausalMask.of(torch.tensor(PACKED), kernel=kernel), 3)
    exact = inputs.run(attend_dense, with_sinks=True)
    for got, wanted in zip(inputs.run(attend, with_sinks=True, dtype=torch.bfloat16), exact, strict=True):
        assert got.dtype == torch.bfloat16
        assert float((got - wanted).detach().norm() / wanted.detach().norm()) < 0.02


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


@pytest.mark.parametrize(("kernel", "soft_cap"), [("auto", None), ("blocks", 2.0)])
def test_no_tensor_grows_with_the_square_of_the_slots(kernel: str, soft_cap: float | None) -> None:
    largest = []
    for num_slots in (512, 1024):
        mask = CausalMask.of(torch.ones(1, num_slots, dtype=torch.int64), kernel=kernel)
        inputs = Inputs(mask, 2, num_heads=2)
        with LargestTensor() as seen:
            inputs.run(attend, dtype=torch.float32, soft_cap=soft_cap)
        largest.append(seen.largest)
    assert largest[1] <= 2 * largest[0] < 1024 * 1024


def test_unrolled_attends_to_every_depth() -> None:
    """The first depth's entries are shared; a cache of it gives back what it gets."""
    inputs = Inputs(CausalMask.of(torch.tensor(PACKED)), 2)
    queries, *entries = inputs.tensors
    unrolled = Unrolled(inputs.mask)
    for depth in range(3):
        keys, values = unrolled.update(*entries[2 * depth : 2 * depth + 2], 0)
        assert keys is entries[2 * depth]
        own = tuple((entries[2 * i], entries[2 * i + 1]) for i in range(1, depth + 1))
        expected = attend_dense(queries, entries[0], entries[1], inputs.mask.dense(), own, scaling=0.3)
        torch.testing.assert_close(unrolled.attend(queries, keys, values, scaling=0.3), expected)
    assert len(unrolled.entries) == 3


def fake_flash_attn() -> ModuleType:
    """The two functions of flash_attn 2.7 and 2.8 that are called, with their signatures, in float64 by definition."""

    def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        scores = (scale * q @ k.transpose(-1, -2)).masked_fill(
            torch.ones(q.shape[2], k.shape[2]).triu(1) > 0, -torch.inf
        )
        return scores, v

    def forward(
        q: Tensor, k: Tensor, v: Tensor, dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int,
        window_size_right: int, softcap: float, alibi_slopes: None, return_softmax: bool,
    ) -> tuple[Tensor, Tensor, None, None]:  # fmt: skip
        assert (dropout_p, causal, window_size_left, window_size_right, softcap) == (0.0, True, -1, -1, 0.0)
        scores, values = attention(q, k, v, softmax_scale)
        return (scores.softmax(-1) @ values).transpose(1, 2).to(q.dtype), scores.logsumexp(-1).float(), None, None

    def backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor, dk: Tensor,
        dv: Tensor, dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int,
        window_size_right: int, softcap: float, alibi_slopes: None, deterministic: bool,
    ) -> None:  # fmt: skip
        assert (dropout_p, causal, window_size_left, window_size_right, softcap) == (0.0, True, -1, -1, 0.0)
        scores, values = attention(q, k, v, softmax_scale)
        weights, slope = (scores - softmax_lse[..., None]).exp(), dout.double().transpose(1, 2)
        common = (slope * out.double().transpose(1, 2)).sum(-1, keepdim=True)
        d_scores = weights * (slope @ values.transpose(-1, -2) - common) * softmax_scale
        groups = (k.shape[2], q.shape[2] // k.shape[2])
        keys = k.double().transpose(1, 2).repeat_interleave(groups[1], 1)
        dq.copy_((d_scores @ keys).transpose(1, 2))
        dk.copy_((d_scores.mT @ q.double().transpose(1, 2)).unflatten(1, groups).sum(2).transpose(1, 2))
        dv.copy_((weights.mT @ slope).unflatten(1, groups).sum(2).transpose(1, 2))

    module = ModuleType("flash_attn.flash_attn_interface")
    module._flash_attn_forward, module._flash_attn_backward = forward, backward  # type: ignore[attr-defined]
    return module


def test_the_flash_attn_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """How it is called; the package itself needs a GPU."""
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", fake_flash_attn())
    inputs = Inputs(CausalMask.of(torch.tensor(PACKED), kernel="flash_attn"), 2)
    exact = inputs.run(attend_dense, with_sinks=True)
    for got, wanted in zip(inputs.run(attend, with_sinks=True, dtype=torch.bfloat16), exact, strict=True):
        assert float((got - wanted).detach().norm() / wanted.detach().norm()) < 0.02
    with pytest.raises(
        ValueError, match=r"flash_attn: expected half precision .* got torch\.float64, 4 and 4; use trainer"
    ):
        inputs.run(attend)


def test_kernels_that_are_refused() -> None:
    check_kernel("auto")
    check_kernel("blocks")
    with pytest.raises(ValueError, match="expected one of auto, blocks, flash_attn, got 'eager'"):
        check_kernel("eager")
    with pytest.raises(
        ValueError, match="flash_attn: that package is not installed; pip install flash-attn or use auto"
    ):
        check_kernel("flash_attn")
