"""How ``unroll`` runs changes neither its values nor its gradients, and its memory is linear in the slots."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch._inductor.config
from helpers.draft_cases import CASES, Case, batch_for, make_draft
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from lkspec.drafts.base import Draft, UnrollOptions
from lkspec.targets.tiny import TinyTarget

ROWS = [[9, 4], [11]]


def values_and_gradients(draft: Draft, target: TinyTarget, rows: list[list[int]], **options: Any) -> list[Tensor]:
    """The unroll, and the gradients of every parameter and of the states it reads."""
    draft.unroll_options = UnrollOptions(**options)
    batch, states = batch_for(target.spec, rows)
    states = replace(states, aux=states.aux.requires_grad_(), last=states.last.requires_grad_())
    hidden = draft.unroll(batch, states)
    value = (hidden * torch.linspace(-1, 1, hidden.shape[-1])).square().sum()
    leaves = [*draft.parameters(), states.aux, states.last]
    found = torch.autograd.grad(value, leaves, allow_unused=True)
    return [hidden.detach(), *(gradient for gradient in found if gradient is not None)]


def check_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for got, wanted in zip(found, expected, strict=True):
        assert float((got - wanted).abs().max()) < 1e-5 * max(float(wanted.abs().max()), 1.0)


@pytest.mark.parametrize("options", [{"checkpoint": True}, {"attention": "blocks"}], ids=["checkpoint", "blocks"])
def test_the_same_values_and_gradients(case: Case, target: TinyTarget, options: dict[str, Any]) -> None:
    draft = make_draft(case, target.spec)
    expected = values_and_gradients(draft, target, ROWS)
    check_same(values_and_gradients(draft, target, ROWS, **options), expected)
    assert len(expected) > 4


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch.compile`` traces forward and backward, but leaves out its C++ compiler, which takes a minute a draft."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))


@pytest.mark.slow
def test_compiled_by_torchs_own_compiler(tiny_target: TinyTarget, monkeypatch: pytest.MonkeyPatch) -> None:
    # Not vectorised: torch would compile a program for each instruction set first, to see which it may use.
    monkeypatch.setattr(torch._inductor.config.cpp, "simdlen", 1)
    draft = make_draft(CASES["medusa"], tiny_target.spec, num_depths=2)
    expected = values_and_gradients(draft, tiny_target, ROWS)
    check_same(values_and_gradients(draft, tiny_target, ROWS, compile=True, checkpoint=True), expected)


@pytest.mark.slow
@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("name", ["eagle3", "medusa", "mlp", "mtp"])
def test_compiled_and_checkpointed(tiny_target: TinyTarget, name: str) -> None:
    draft = make_draft(CASES[name], tiny_target.spec, num_depths=2)
    expected = values_and_gradients(draft, tiny_target, ROWS)
    check_same(values_and_gradients(draft, tiny_target, ROWS, compile=True, checkpoint=True), expected)


@pytest.mark.slow
@pytest.mark.usefixtures("traced")
def test_compiled_for_one_packing_and_run_on_another(tiny_target: TinyTarget) -> None:
    draft = make_draft(CASES["eagle3"], tiny_target.spec, num_depths=2)
    for rows in (ROWS, [[5, 3, 9], [2, 2]], [[6, 6, 3], [12]]):
        expected = values_and_gradients(draft, tiny_target, rows)
        check_same(values_and_gradients(draft, tiny_target, rows, compile=True), expected)


def kept_bytes(draft: Draft, target: TinyTarget, num_slots: int) -> int:
    """What ``unroll`` keeps for backward, each storage once, parameters and states left out."""
    batch, states = batch_for(target.spec, [[num_slots]])
    left_out = {tensor.untyped_storage().data_ptr() for tensor in (*draft.parameters(), *draft.buffers(), states.aux)}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = draft.unroll(batch, states)
    assert result.requires_grad
    return sum(size for pointer, size in kept.items() if pointer not in left_out)


@pytest.mark.parametrize("name", ["eagle3", "mtp"])
def test_what_is_kept_for_backward_is_linear_in_the_slots(target: TinyTarget, name: str) -> None:
    draft = make_draft(CASES[name], target.spec)
    small, middle, large = (kept_bytes(draft, target, num_slots) for num_slots in (128, 256, 512))
    assert large - middle < 2.1 * (middle - small)


@pytest.mark.parametrize("name", ["eagle3", "mtp"])
def test_checkpointing_keeps_less(tiny_target: TinyTarget, name: str) -> None:
    draft = make_draft(CASES[name], tiny_target.spec)
    whole = kept_bytes(draft, tiny_target, 256)
    draft.unroll_options = UnrollOptions(checkpoint=True)
    assert kept_bytes(draft, tiny_target, 256) < whole / 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compile": "yes"}, r"unroll\.compile: expected true or false, got 'yes'"),
        ({"checkpoint": 1}, r"unroll\.checkpoint: expected true or false, got 1"),
        ({"attention": "sdpa"}, r"unroll\.attention: attention kernel: expected one of auto, blocks, flash_attn"),
        ({"attention": "flash_attn"}, r"unroll\.attention: .*not installed; pip install flash-attn or use auto"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UnrollOptions(**options)
