"""A decoder layer that stands alone computes what it computes inside its target."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from target_batches import random_tokens
from torch import Tensor

from lkspec.nn.kv_cache import PositionCache
from lkspec.targets.decoder_layer import StandaloneLayer
from lkspec.targets.tiny import TinyTarget

KINDS = [
    ("llama", "full_attention"),
    *((k, t) for k in ("gemma3", "gpt_oss") for t in ("full_attention", "sliding_attention")),
]
NUM_SLOTS = 13  # more than the sliding window of 8


@pytest.fixture
def targets(tiny_target: TinyTarget, tiny_gemma3: TinyTarget, tiny_gpt_oss: TinyTarget) -> dict[str, TinyTarget]:
    return {"llama": tiny_target, "gemma3": tiny_gemma3, "gpt_oss": tiny_gpt_oss}


def layer_in_target(target: TinyTarget, layer_type: str, tokens: Tensor) -> tuple[Any, Tensor, Tensor]:
    """The last layer of a type, what enters it and what it returns when the target reads these tokens."""
    decoder = target.model.get_decoder()
    types = getattr(decoder.config, "layer_types", None) or ["full_attention"] * len(decoder.layers)
    layer = decoder.layers[len(types) - 1 - types[::-1].index(layer_type)]
    seen: dict[str, Tensor] = {}

    def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        seen["input"] = args[0] if args else kwargs["hidden_states"]
        seen["output"] = output if isinstance(output, Tensor) else output[0]

    handle = layer.register_forward_hook(hook, with_kwargs=True)
    with torch.no_grad():
        target.model(tokens)
    handle.remove()
    return layer, seen["input"], seen["output"]


def standalone(target: TinyTarget, layer_type: str, *, copied: bool = True) -> StandaloneLayer:
    window = 8 if layer_type == "sliding_attention" else None
    return StandaloneLayer(target.model.get_decoder(), layer_type=layer_type, window=window, copied=copied)


@pytest.mark.parametrize(("kind", "layer_type"), KINDS)
def test_a_copied_layer_is_the_targets(targets: dict[str, TinyTarget], kind: str, layer_type: str) -> None:
    """All slots at once, and a few at a time through a cache."""
    target = targets[kind]
    tokens = random_tokens(2, NUM_SLOTS)
    _, entering, expected = layer_in_target(target, layer_type, tokens)
    layer = standalone(target, layer_type)
    for pieces in ([NUM_SLOTS], [5, 1, 7]):
        cache, outputs, start = PositionCache(2), [], 0
        for width in pieces:
            positions = torch.arange(start, start + width).expand(2, width)
            cache.at(positions)
            with torch.no_grad():
                out = layer(entering[:, start : start + width], positions, cache.mask(layer.window), cache)
            outputs.append(out)
            start += width
        torch.testing.assert_close(torch.cat(outputs, dim=1), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "layer_type"), KINDS)
def test_a_copy_is_trained_apart(targets: dict[str, TinyTarget], kind: str, layer_type: str) -> None:
    original, *_ = layer_in_target(targets[kind], layer_type, random_tokens(1, 3))
    layer = standalone(targets[kind], layer_type)
    theirs = dict(original.named_parameters())
    ours = dict(layer.layer.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, parameter in layer.named_parameters():
        assert parameter.requires_grad, name
        assert parameter.dtype == torch.float32, name
    for name, parameter in ours.items():
        assert torch.equal(parameter, theirs[name]), name
        assert parameter.data_ptr() != theirs[name].data_ptr(), name
    attention = targets[kind].model.get_decoder().config._attn_implementation
    assert attention == targets[kind].attn_implementation, "the target's own configuration is left alone"


@pytest.mark.parametrize(("kind", "layer_type"), KINDS)
def test_a_random_layer_is_drawn_as_the_model_draws_it(
    targets: dict[str, TinyTarget], kind: str, layer_type: str
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = standalone(targets[kind], layer_type, copied=False)
    std = targets[kind].config.initializer_range
    assert std == 0.02
    matrices = [(name, p) for name, p in layer.named_parameters() if p.ndim > 1 and not name.endswith("bias")]
    assert len(matrices) >= 6
    for name, parameter in matrices:
        assert float(parameter.detach().std()) == pytest.approx(std, rel=0.2), name
        assert abs(float(parameter.detach().mean())) < 0.2 * std, name
    assert all(parameter.isfinite().all() for parameter in layer.parameters())


class GrowingEntries:
    """Keys and values of one pass after another, side by side."""

    def __init__(self) -> None:
        self.entries: list[tuple[Tensor, Tensor]] = []

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: object) -> tuple[Tensor, Tensor]:
        assert layer_idx == 0
        self.entries.append((keys, values))
        return torch.cat([k for k, _ in self.entries], dim=2), torch.cat([v for _, v in self.entries], dim=2)


@pytest.mark.parametrize(("kind", "layer_type"), KINDS)
def test_own_keys_are_columns_of_one_wide_mask(targets: dict[str, TinyTarget], kind: str, layer_type: str) -> None:
    """Later depths beyond the mask's columns are a diagonal: the same as masking [S, 3 S] keys by hand."""
    layer = standalone(targets[kind], layer_type)
    generator = torch.Generator().manual_seed(0)
    hidden = [torch.randn(2, NUM_SLOTS, 64, generator=generator) for _ in range(3)]
    slots = torch.arange(NUM_SLOTS)
    positions = slots.expand(2, NUM_SLOTS)
    distance = slots[:, None] - slots[None, :]
    own, wide = GrowingEntries(), GrowingEntries()
    for depth in range(3):
        narrow = distance >= 0
        if layer.window is not None:
            narrow = narrow & (distance + depth < layer.window)
        dense = torch.cat([narrow, *[torch.eye(NUM_SLOTS, dtype=torch.bool)] * depth], dim=-1)
        with torch.no_grad():
            first = layer(hidden[depth], positions + depth, narrow.expand(2, 1, -1, -1), own)
            second = layer(hidden[depth], positions + depth, dense.expand(2, 1, -1, -1), wide)
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)
    assert len(own.entries) == 3


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt_oss"])
def test_the_layer_of_a_spec_sees_everything(targets: dict[str, TinyTarget], kind: str) -> None:
    """Of a target with several kinds of layers a draft takes the full-attention one."""
    target = targets[kind]
    tokens = random_tokens(1, NUM_SLOTS)
    _, entering, expected = layer_in_target(target, "full_attention", tokens)
    layer = target.spec.new_layer(True)
    assert layer.window is None
    cache, positions = PositionCache(1), torch.arange(NUM_SLOTS)[None]
    cache.at(positions)
    with torch.no_grad():
        torch.testing.assert_close(layer(entering, positions, cache.mask(), cache), expected, rtol=1e-5, atol=1e-5)
