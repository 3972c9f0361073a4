"""The dimensions of a decoder layer out of a transformers config, and in the words of a Llama config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lkspec.types import DecoderDims, TargetSpec

# A Llama config's words for a decoder layer, and our attributes.
_ATTRIBUTES = {
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "intermediate_size": "ffn_size",
    "rms_norm_eps": "rms_norm_eps",
    "max_position_embeddings": "max_positions",
    "rope_parameters": "rope_parameters",
}


def decoder_dims(config: Any) -> DecoderDims:
    """One full-attention layer of a model, as a draft's plain Llama layer mirrors it.

    Raises:
        ValueError: RoPE that changes with the sequence length.
    """
    rope = dict(getattr(config, "rope_parameters", None) or {})
    if "full_attention" in rope:  # one set per layer type: the draft's layer is a full-attention one
        rope = dict(rope["full_attention"])
    rope.pop("partial_rotary_factor", None)  # the draft's layer rotates whole heads, here and in engines
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    inv_freq, factor = _rope_frequencies(config, rope, head_dim)
    ffn_size = config.intermediate_size
    experts_per_token = getattr(config, "num_experts_per_tok", None)
    if experts_per_token:  # one dense block as wide as the experts that a token uses
        ffn_size = experts_per_token * (getattr(config, "moe_intermediate_size", None) or config.intermediate_size)
    return DecoderDims(
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        head_dim=head_dim,
        ffn_size=ffn_size,
        rms_norm_eps=getattr(config, "rms_norm_eps", 1e-6),
        max_positions=config.max_position_embeddings,
        inv_freq=inv_freq,
        rope_attention_factor=factor,
        rope_parameters=rope,
    )


def llama_words(dims: DecoderDims) -> dict[str, Any]:
    """The same layer in the words of a Llama config, plain data."""
    words = {word: getattr(dims, attribute) for word, attribute in _ATTRIBUTES.items()}
    return {**words, "rope_parameters": dict(dims.rope_parameters)}


def different_words(first: DecoderDims, second: DecoderDims) -> list[str]:
    """The words of ``llama_words`` in which two layers differ: RoPE by its frequencies, however it is spelled."""
    words, others = llama_words(first), llama_words(second)
    same_rope = (
        first.inv_freq.shape == second.inv_freq.shape
        and torch.allclose(first.inv_freq, second.inv_freq, rtol=1e-6, atol=0)
        and first.rope_attention_factor == second.rope_attention_factor
    )
    same = {**{word: value == others[word] for word, value in words.items()}, "rope_parameters": same_rope}
    return [word for word in words if not same[word]]


def dims_from_words(words: Mapping[str, Any], *, hidden_size: int) -> DecoderDims:
    """The dimensions that a Llama config with these words has; what they leave out is Llama's default.

    Words that are not Llama's own but an older spelling (``rope_theta``, ``rope_scaling``) are understood.

    Raises:
        ValueError: RoPE that changes with the sequence length.
    """
    known = (*_ATTRIBUTES, "rope_theta", "rope_scaling")
    given = {name: words[name] for name in known if words.get(name) is not None}
    return decoder_dims(LlamaConfig(hidden_size=hidden_size, **given))


def with_layer(spec: TargetSpec, words: Mapping[str, Any] | None) -> TargetSpec:
    """A target's description with the words of a Llama config in place of its own decoder layer's.

    Raises:
        ValueError: an unknown word, or RoPE that changes with the sequence length.
    """
    if not words:
        return spec
    unknown = [word for word in words if word not in _ATTRIBUTES]
    if unknown:
        raise ValueError(f"draft.layer: expected {', '.join(_ATTRIBUTES)}, got {', '.join(unknown)}")
    dims = dims_from_words({**llama_words(spec.dims), **words}, hidden_size=spec.dims.hidden_size)
    return replace(spec, dims=dims)


def _rope_frequencies(config: Any, rope: dict[str, Any], head_dim: int) -> tuple[Tensor, float]:
    kind = rope.get("rope_type", "default")
    if kind == "default":
        exponent = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        return 1.0 / (float(rope.get("rope_theta", 10_000.0)) ** exponent), 1.0
    if kind not in ("linear", "llama3", "yarn"):
        raise ValueError(
            f"the target's RoPE type {kind!r} changes with the sequence length; a draft's layer supports "
            "default, linear, llama3 and yarn"
        )
    nested = "full_attention" in config.rope_parameters
    options = {"layer_type": "full_attention"} if nested else {}
    inv_freq, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), **options)
    return inv_freq.float(), float(factor)
