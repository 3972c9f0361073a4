"""What token_stats keeps between forward and backward, what it ever makes, and how often it multiplies."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from fused_cases import Case, as_dict, in_forward, make_case, weighted
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lkspec.losses.objectives import JensenShannon, LKAlpha, jensen_shannon
from lkspec.vocab import DraftVocab

K, B, T = 7, 2, 30
D, V = 53, 101  # sizes that no other dimension has
CHUNK = 6
TRUNCATED, FULL = DraftVocab(torch.arange(D) + 20, V), DraftVocab.full(V)
Loss = Callable[[Case], Tensor]


def memory_case(vocab: DraftVocab) -> Case:
    mask = torch.zeros(K, B, T, dtype=torch.bool)
    for depth in range(1, K + 1):
        mask[depth - 1, :, 2 : -1 - depth] = True
    return make_case(vocab=vocab, heads="A" * K, shaped=True, mask=mask)


def num_target_rows(case: Case) -> int:
    return len({(row, anchor + depth + 1) for depth, row, anchor in case.mask.nonzero().tolist()})


def recomputing(case: Case) -> Tensor:
    return weighted(as_dict(case.fused(chunk_size=CHUNK)))


def in_one_pass(case: Case) -> Tensor:
    promised = in_forward(LKAlpha(), case)
    value = case.fused(chunk_size=CHUNK, in_forward=promised).value
    assert value is not None
    return (promised.weights * value.sum((1, 2))).sum()


def form_b(case: Case) -> Tensor:
    row_value = case.fused(chunk_size=CHUNK, row_value=jensen_shannon).row_value
    assert row_value is not None
    return row_value.sum()


def form_b_in_one_pass(case: Case) -> Tensor:
    promised = in_forward(JensenShannon(), case)
    value = case.fused(chunk_size=CHUNK, in_forward=promised, row_value=jensen_shannon).value
    assert value is not None
    return (promised.weights * value.sum((1, 2))).sum()


def readable(case: Case) -> Tensor:
    return weighted(as_dict(case.reference()))


every_way = pytest.mark.parametrize(
    "loss", [recomputing, in_one_pass, form_b, form_b_in_one_pass], ids=lambda loss: loss.__name__
)
both_vocabularies = pytest.mark.parametrize("vocab", [TRUNCATED, FULL], ids=["truncated", "full"])


def tensors_within(value: Any, seen: set[int]) -> Iterable[Tensor]:
    """Tensors that an object holds, at any level of containers and of our own classes."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from tensors_within(part, seen)
    elif isinstance(value, tuple | list):
        for part in value:
            yield from tensors_within(part, seen)
    elif type(value).__module__.startswith("lkspec"):
        yield from tensors_within(vars(value), seen)


def kept_by_graph(loss: Tensor) -> list[Tensor]:
    """Tensors that are attributes of a Python-defined node, which the hooks for saved tensors do not see."""
    found: list[Tensor] = []
    seen: set[int] = set()
    waiting = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and id(node) not in seen:
            seen.add(id(node))
            found += tensors_within(getattr(node, "__dict__", {}), seen)
            waiting += [parent for parent, _ in node.next_functions]
    return found


class Saved:
    """What autograd holds in a saved tensor's place: gone with the graph, such as that of a form (b) block."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def kept(loss: Loss, case: Case) -> list[Tensor]:
    """Everything that forward leaves for backward, except a head's own weights and their gradients."""
    saved: weakref.WeakSet[Saved] = weakref.WeakSet()

    def remember(tensor: Tensor) -> Saved:
        saved.add(holder := Saved(tensor))
        return holder

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda holder: holder.tensor):
        value = loss(case)
    gc.collect()
    weights = {case.heads[0].weight.shape, case.target_head.weight.shape}
    tensors = [holder.tensor for holder in saved] + kept_by_graph(value)
    return [tensor for tensor in tensors if tensor.shape not in weights]


def is_wide(tensor: Tensor) -> bool:
    """Whether it has a row of vocabulary size for each of some tokens."""
    return tensor.ndim > 1 and bool({D, V} & set(tensor.shape))


@pytest.mark.slow
@both_vocabularies
@every_way
def test_nothing_of_vocabulary_width_is_kept(loss: Loss, vocab: DraftVocab):
    case = memory_case(vocab)
    everything = kept(loss, case)
    assert any(tensor.shape == case.hidden.shape or tensor.shape[-1] == case.hidden.shape[-1] for tensor in everything)
    assert not [tensor.shape for tensor in everything if is_wide(tensor)]
    assert [tensor for tensor in kept(readable, case) if is_wide(tensor)], "the probe sees what is kept"


class Widest(TorchDispatchMode):
    """Remembers the largest tensor of vocabulary width that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_within(result, set()):
            if is_wide(tensor):
                self.num_elements = max(self.num_elements, tensor.numel())
        return result


@both_vocabularies
@every_way
def test_no_tensor_of_vocabulary_width_outgrows_a_chunk(loss: Loss, vocab: DraftVocab):
    """In forward and backward, at one depth at a time."""
    case = memory_case(vocab)
    assert case.target_head.weight.numel() <= CHUNK * V
    assert num_target_rows(case) > 4 * CHUNK
    with Widest() as widest:
        loss(case).backward()
    assert widest.num_elements == CHUNK * V


class Products(TorchDispatchMode):
    """Counts matrix products with a weight, and the rows that they multiply."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.storage = weight.untyped_storage().data_ptr()
        self.num_rows: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.linear):
            tensors = [arg for arg in args if isinstance(arg, Tensor)]
            if any(tensor.untyped_storage().data_ptr() == self.storage for tensor in tensors):
                self.num_rows.append(tensors[0].shape[0])
        return func(*args, **(kwargs or {}))


@both_vocabularies
@every_way
def test_the_target_head_multiplies_each_row_once_a_pass(loss: Loss, vocab: DraftVocab):
    case = memory_case(vocab)
    rows = num_target_rows(case)
    with Products(case.target_head.weight) as forward:
        value = loss(case)
    assert len(forward.num_rows) == math.ceil(rows / CHUNK)
    assert sum(forward.num_rows) == rows
    with Products(case.target_head.weight) as backward:
        value.backward()
    again = loss in (recomputing, form_b) and vocab.is_full  # of a truncated vocabulary only its own columns, a copy
    assert backward.num_rows == (forward.num_rows if again else [])


@pytest.mark.parametrize(("loss", "num_passes"), [(recomputing, 2), (form_b, 2), (in_one_pass, 1)])
def test_the_draft_head_multiplies_each_depth_once_a_pass(loss: Loss, num_passes: int):
    """Besides one product a chunk and depth for the gradient of the hidden states."""
    case = memory_case(TRUNCATED)
    with Products(case.heads[0].weight) as products:
        loss(case).backward()
    assert len(products.num_rows) == (num_passes + 1) * K * math.ceil(num_target_rows(case) / CHUNK)


@pytest.mark.parametrize("loss", [in_one_pass, form_b_in_one_pass], ids=lambda loss: loss.__name__)
def test_no_gradient_is_formed_without_grad_mode(loss: Loss):
    case = memory_case(TRUNCATED)
    with torch.no_grad(), Products(case.heads[0].weight) as products:
        value = loss(case)
    assert len(products.num_rows) == K * math.ceil(num_target_rows(case) / CHUNK)
    assert value.item() == pytest.approx(loss(case).item(), rel=1e-6)
