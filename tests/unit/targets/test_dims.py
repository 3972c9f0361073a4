"""A decoder layer's dimensions in the words of a Llama config."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lkspec.targets.base import default_aux_layer_ids
from lkspec.targets.dims import dims_from_words, llama_words, with_layer
from lkspec.targets.tiny import TinyTarget

KINDS = ("llama", "gemma3", "gpt_oss", "deepseek_v3")


@pytest.mark.parametrize("kind", KINDS)
def test_words_lead_back_to_the_dimensions(kind: str) -> None:
    dims = TinyTarget(kind=kind, device="cpu").spec.dims
    again = dims_from_words(llama_words(dims), hidden_size=dims.hidden_size)
    assert torch.equal(again.inv_freq, dims.inv_freq)
    assert llama_words(again) == llama_words(dims)
    assert (again.hidden_size, again.rope_attention_factor) == (dims.hidden_size, dims.rope_attention_factor)


@pytest.mark.parametrize(
    "words",
    [
        {"rope_theta": 1000.0},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1000.0}},
        {"rope_theta": 1000.0, "rope_scaling": None},
        {"rope_theta": 1000.0, "rope_scaling": {"rope_type": "default"}},
    ],
)
def test_rope_in_older_and_newer_words(words: dict[str, Any]) -> None:
    dims = dims_from_words({**words, "num_attention_heads": 4, "intermediate_size": 96}, hidden_size=64)
    torch.testing.assert_close(dims.inv_freq, 1000.0 ** (-torch.arange(0, 16, 2) / 16))
    assert (dims.num_heads, dims.num_kv_heads, dims.head_dim, dims.ffn_size) == (4, 4, 16, 96)
    assert dims.rms_norm_eps == 1e-6


def test_a_linear_scaling_in_older_words() -> None:
    words = {"num_attention_heads": 4, "rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 100.0}
    dims = dims_from_words(words, hidden_size=64)
    torch.testing.assert_close(dims.inv_freq, 100.0 ** (-torch.arange(0, 16, 2) / 16) / 4.0)


def test_rope_that_changes_with_the_length() -> None:
    words = {"num_attention_heads": 4, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 100.0}}
    with pytest.raises(ValueError, match="'dynamic' changes with the sequence length"):
        dims_from_words(words, hidden_size=64)


def test_a_layer_of_its_own(tiny_target: TinyTarget) -> None:
    spec = tiny_target.spec
    assert with_layer(spec, None) is spec
    assert with_layer(spec, {}) is spec
    changed = with_layer(
        spec, {"intermediate_size": 40, "rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}
    )
    assert changed.dims.ffn_size == 40
    torch.testing.assert_close(changed.dims.inv_freq, 50.0 ** (-torch.arange(0, 16, 2) / 16))
    assert (changed.dims.num_heads, changed.dims.head_dim) == (spec.dims.num_heads, spec.dims.head_dim)
    assert changed.embedding is spec.embedding
    assert spec.dims.ffn_size == 128


def test_a_word_that_llama_has_not(tiny_target: TinyTarget) -> None:
    with pytest.raises(ValueError, match=r"^draft\.layer: expected num_attention_heads, .*, got hidden_size, width$"):
        with_layer(tiny_target.spec, {"hidden_size": 32, "width": 1, "head_dim": 16})


def test_default_auxiliary_layers() -> None:
    assert default_aux_layer_ids(32) == (2, 16, 29)
    assert default_aux_layer_ids(7) == (2, 3, 4)
    assert default_aux_layer_ids(6) is None
