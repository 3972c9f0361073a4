"""EAGLE-3 (Li et al. 2025, arXiv 2503.01840): one decoder layer over fused hidden states of the target.

At anchor t the layer reads the embedding of x_{t+1} and h_t = fc(auxiliary states at t); at depth k >= 2 it reads
x_{t+k} and its own output of depth k - 1 at the same anchor (training-time test). Keys: depth 1 of all anchors <= t,
then this anchor's own depths 2..k; RoPE position t + k - 1. Parameters carry the names that vLLM and SGLang load.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lkspec.drafts.layers import (
    INIT_STD,
    GatedDown,
    GatedMLP,
    RMSNorm,
    Rope,
    TrainingTimeTest,
    as_multiplied,
    init_head,
    linear,
    rotate,
)
from lkspec.nn.attention import CausalMask, Own, Unrolled, attend
from lkspec.nn.kv_cache import PositionCache
from lkspec.types import DecoderDims, LinearHead, TargetSpec, TargetStates
from lkspec.vocab import DraftVocab

# Parts of the model types that vLLM 0.20 accepts as targets of EAGLE-3.
_VLLM_TARGETS = ("llama", "qwen", "minicpm", "gpt_oss", "hunyuan_vl", "hunyuan_v1_dense", "afmoe", "minimax")


class Eagle3(TrainingTimeTest):
    """The EAGLE-3 draft of a target.

    Args:
        spec: the target's dimensions, embedding (shared, frozen) and head.
        vocab: the draft vocabulary.
        num_depths: depths K of the training-time test.
        head_init: ``target`` starts the head from the target's rows (scaled as the target's head is) and the norm
            before it at logits of unit variance; ``random`` starts from neither.
        norm_before_residual: the layer's residual stream starts at hidden_norm(h) instead of h.

    Raises:
        ValueError: num_depths < 1, an unknown head_init, or ``target`` where the target's head has a bias.
    """

    reads_aux = True
    title = "EAGLE-3"
    paper = "Li et al. 2025, arXiv:2503.01840"

    def __init__(
        self,
        spec: TargetSpec,
        vocab: DraftVocab,
        *,
        num_depths: int = 6,
        head_init: str = "target",
        norm_before_residual: bool = False,
        paper_eta: float = 3.0,
    ) -> None:
        super().__init__(vocab, num_depths, paper_eta=paper_eta)
        self.norm_before_residual = norm_before_residual
        self.served_by = _served_by(spec.model_type)
        dims = self.dims = spec.dims
        self.register_buffer("embedding", spec.embedding, persistent=False)
        self.fc = linear(spec.num_aux * dims.hidden_size, dims.hidden_size)
        self.midlayer = _FusedLayer(dims, norm_before_residual=norm_before_residual)
        self.norm = RMSNorm(dims.hidden_size, eps=dims.rms_norm_eps)
        self.lm_head = nn.Linear(dims.hidden_size, vocab.size, bias=False)
        init_head(self.lm_head.weight, spec, vocab, head_init, std=INIT_STD)
        if head_init == "target":
            # Logits of about unit variance at the start: the target's rows are long, and steps spent on unlearning
            # confident nonsense are lost.
            nn.init.constant_(self.norm.weight, 1.0 / float(self.lm_head.weight.detach().norm(dim=1).mean()))

    def head(self, depth: int) -> LinearHead:
        return LinearHead(weight=self.lm_head.weight)

    def first(self, states: TargetStates) -> Float[Tensor, "B T H"]:
        return self.fc(states.aux.to(self.fc.weight.dtype))

    def of_text(self, tokens: Int[Tensor, "B T"], num_depths: int) -> Callable[[int], _Text]:
        weights, length = self.midlayer.weights(), tokens.shape[1]
        # What depends on the token alone is computed once, and moved.
        of_tokens = nn.functional.pad(self.midlayer.of_tokens(self._embed(tokens), weights), (0, 0, 0, num_depths))
        return lambda depth: (of_tokens[:, depth : depth + length], weights)

    def depth(
        self,
        hidden: Float[Tensor, "B T H"],
        text: _Text,
        positions: Int[Tensor, "B T"],
        mask: CausalMask,
        entries: Own,
    ) -> tuple[Float[Tensor, "B T H"], Float[Tensor, "B T H"], tuple[Tensor, Tensor]]:
        unrolled = Unrolled(mask, entries)
        hidden = self.compiled(self.midlayer.unrolled)(hidden, *text, positions, unrolled)
        return hidden, self.norm(hidden), unrolled.entries[-1]

    def before_head(self, hidden: Float[Tensor, "B H"]) -> Float[Tensor, "B H"]:
        return self.norm(hidden)

    def cached_step(
        self, cache: PositionCache, tokens: Int[Tensor, "B S"], hidden: Float[Tensor, "B S H"], positions: Tensor
    ) -> Float[Tensor, "B S H"]:
        queries, keys, values = self.midlayer.project(self._embed(tokens), hidden, positions)
        cache.at(positions)
        keys, values = cache.update(keys, values, 0)
        return self.midlayer.finish(hidden, attend(queries, keys, values, cache.mask()))

    def _embed(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B T H"]:
        return nn.functional.embedding(tokens, self.embedding).to(self.fc.weight.dtype)


def _served_by(model_type: str) -> str:
    if any(name in model_type for name in _VLLM_TARGETS):
        return "vLLM and SGLang (EAGLE-3)"
    return f"vLLM and SGLang serve EAGLE-3, but for {model_type} targets only if your version lists them"


class _Weights(NamedTuple):
    """Weights of the layer; those that read the same input lie below one another."""

    of_tokens: Float[Tensor, "QKV H"]
    of_hidden: Float[Tensor, "QKV H"]
    gate_up: Float[Tensor, "FF H"]
    down: Float[Tensor, "H F"]


_Text = tuple[Float[Tensor, "B T QKV"], _Weights]


class _FusedLayer(nn.Module):
    """A Llama decoder layer whose attention reads concat(input_layernorm(embedding), hidden_norm(h))."""

    def __init__(self, dims: DecoderDims, *, norm_before_residual: bool) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = dims.num_heads, dims.num_kv_heads, dims.head_dim
        self.norm_before_residual = norm_before_residual
        self.input_layernorm = RMSNorm(dims.hidden_size, eps=dims.rms_norm_eps)
        self.hidden_norm = RMSNorm(dims.hidden_size, eps=dims.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(dims.hidden_size, eps=dims.rms_norm_eps)
        self.self_attn = nn.ModuleDict(
            {
                "q_proj": linear(2 * dims.hidden_size, dims.num_heads * dims.head_dim),
                "k_proj": linear(2 * dims.hidden_size, dims.num_kv_heads * dims.head_dim),
                "v_proj": linear(2 * dims.hidden_size, dims.num_kv_heads * dims.head_dim),
                "o_proj": linear(dims.num_heads * dims.head_dim, dims.hidden_size),
            }
        )
        self.mlp = GatedMLP(dims.hidden_size, dims.ffn_size)
        self.rope = Rope(dims.inv_freq, dims.rope_attention_factor)

    def project(
        self, embedded: Float[Tensor, "B S H"], hidden: Float[Tensor, "B S H"], positions: Int[Tensor, "B S"]
    ) -> tuple[Float[Tensor, "B N S E"], Float[Tensor, "B M S E"], Float[Tensor, "B M S E"]]:
        """Queries, keys and values; RoPE is applied to the first two."""
        fused = torch.cat([self.input_layernorm(embedded), self.hidden_norm(hidden)], dim=-1)
        queries = self._split(self.self_attn["q_proj"](fused), self.num_heads)
        keys = self._split(self.self_attn["k_proj"](fused), self.num_kv_heads)
        values = self._split(self.self_attn["v_proj"](fused), self.num_kv_heads)
        rotation = self.rope(positions, queries.dtype)
        return rotate(queries, rotation), rotate(keys, rotation), values

    def weights(self) -> _Weights:
        """The layer's weights as ``unroll`` multiplies them."""
        qkv = torch.cat([self.self_attn.get_parameter(f"{name}_proj.weight") for name in "qkv"])
        gate_up = torch.cat([self.mlp.gate_proj.weight, self.mlp.up_proj.weight])
        of_tokens, of_hidden = qkv.chunk(2, dim=1)
        return _Weights(*(as_multiplied(part) for part in (of_tokens, of_hidden, gate_up, self.mlp.down_proj.weight)))

    def of_tokens(self, embedded: Float[Tensor, "B T H"], weights: _Weights) -> Float[Tensor, "B T QKV"]:
        """The embeddings' part of queries, keys and values, before RoPE."""
        return nn.functional.linear(self.input_layernorm(embedded), weights.of_tokens)

    def unrolled(
        self,
        hidden: Float[Tensor, "B T H"],
        of_tokens: Float[Tensor, "B T QKV"],
        weights: _Weights,
        positions: Int[Tensor, "B T"],
        unrolled: Unrolled,
    ) -> Float[Tensor, "B T H"]:
        """One depth: ``project``, attention and ``finish`` with fewer, larger products."""
        normed = self.hidden_norm(hidden)
        heads = self._split(of_tokens + nn.functional.linear(normed, weights.of_hidden), -1)
        queries, keys, values = heads.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        rotation = self.rope(positions, heads.dtype)
        # A copy of the values: a view of them would keep all heads for backward.
        mixed = unrolled.attend(rotate(queries, rotation), rotate(keys, rotation), values.clone())
        residual = normed if self.norm_before_residual else hidden
        hidden = residual + self.self_attn["o_proj"](mixed.transpose(1, 2).flatten(2))
        gate_up = nn.functional.linear(self.post_attention_layernorm(hidden), weights.gate_up)
        return hidden + GatedDown.apply(gate_up, weights.down)

    def finish(self, hidden: Float[Tensor, "B S H"], mixed: Float[Tensor, "B N S E"]) -> Float[Tensor, "B S H"]:
        """The rest of the layer: output projection, residual and MLP. The result is what the next depth reads."""
        residual = self.hidden_norm(hidden) if self.norm_before_residual else hidden
        hidden = residual + self.self_attn["o_proj"](mixed.transpose(1, 2).flatten(2))
        return hidden + self.mlp(self.post_attention_layernorm(hidden))

    def _split(self, flat: Float[Tensor, "B S NE"], num_heads: int) -> Float[Tensor, "B N S E"]:
        return flat.unflatten(-1, (num_heads, self.head_dim)).transpose(1, 2)
