"""Batches and reference states for the tests of targets."""

from __future__ import annotations

import torch
from torch import Tensor

from lkspec.targets.transformers import TransformersTarget
from lkspec.types import Batch, TargetStates, stack_rows

#: Every kind of attention that decoding must handle, with each implementation that has it.
KINDS = [
    ("llama", "sdpa"),
    ("llama", "eager"),
    ("gemma3", "sdpa"),
    ("gemma3", "eager"),
    ("gpt_oss", "eager"),
    ("deepseek_v3", "sdpa"),
    ("deepseek_v3", "eager"),
]


def random_tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed))


def padded(rows: list[Tensor]) -> Batch:
    """One conversation a row, padded on the right."""
    return packed([[row] for row in rows])


def packed(rows: list[list[Tensor]]) -> Batch:
    """Several conversations a row, padded on the right."""
    tokens = [torch.cat(row) for row in rows]
    positions = [torch.cat([torch.arange(len(part)) for part in row]) for row in rows]
    segments = [torch.cat([torch.full_like(part, i + 1) for i, part in enumerate(row)]) for row in rows]
    ids = tuple(tuple(f"r{r}s{s}" for s in range(len(row))) for r, row in enumerate(rows))
    return Batch(stack_rows(tokens), stack_rows(positions), stack_rows(segments), stack_rows(segments), ids)


def alone(target: TransformersTarget, tokens: Tensor) -> TargetStates:
    """The states of one conversation [T] read by itself, by transformers' own forward pass without our masks."""
    output = target.model(tokens[None], output_hidden_states=True)
    entered = output.hidden_states
    return TargetStates(torch.cat([entered[i] for i in target.aux_layer_ids], -1)[0], entered[-1][0])


def assert_states_close(got: TargetStates, expected: TargetStates, tolerance: float = 1e-5) -> None:
    """Both states to a tolerance relative to their largest entry."""
    for name in ("aux", "last"):
        ours, theirs = getattr(got, name), getattr(expected, name)
        assert ours.shape == theirs.shape
        error = float((ours - theirs).abs().max() / theirs.abs().max())
        assert error < tolerance, f"{name}: relative error {error:.1e}"
