"""Small random targets for tests and dry runs: nothing is downloaded, every attention variant is covered.

A random model whose logits are nearly flat would accept almost any draft and hide mistakes, so the weights are drawn
such that each sub-layer changes the residual stream as much as the embedding does, and logits have a standard
deviation of ``logit_std``.
"""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from lkspec.targets.transformers import TransformersTarget, parse_dtype

_NUM_BYTES = 256
_SPECIAL_TOKENS = ("<|im_start|>", "<|im_end|>", "<|pad|>")
_EOS_ID, _PAD_ID = 257, 258
_MIN_VOCAB_SIZE = _NUM_BYTES + len(_SPECIAL_TOKENS)
_SLIDING_WINDOW = 8
_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class TinyTarget(TransformersTarget):
    """A seeded random model over bytes: ``kind`` is llama (grouped queries), gemma3 (sliding layers, query and key
    norms, two RoPE bases), gpt_oss (attention sinks, alternating sliding layers, YaRN, 2 of 4 experts) or deepseek_v3
    (latent attention, interleaved RoPE, 3 of 8 experts in groups beside a shared one, the first layer dense).

    The global random state is left alone. The head is never tied to the embedding: a random tied head mostly
    predicts the token just read.

    Raises:
        ValueError: an unknown kind or dtype, or a vocabulary smaller than the tokenizer's 259 tokens.
    """

    def __init__(
        self,
        *,
        name: str = "tiny",
        kind: str = "llama",
        seed: int = 0,
        num_layers: int = 8,
        hidden_size: int = 64,
        num_heads: int = 4,
        num_kv_heads: int = 2,
        ffn_size: int = 128,
        vocab_size: int = 264,
        max_positions: int = 2048,
        logit_std: float = 3.0,
        device: str = "auto",
        dtype: str = "float32",
        attn_implementation: str | None = None,
        aux_layer_ids: tuple[int, ...] | None = None,
    ) -> None:
        if kind not in _KINDS:
            raise ValueError(f"target.kind: expected one of {', '.join(_KINDS)}, got {kind!r}")
        if vocab_size < _MIN_VOCAB_SIZE:
            raise ValueError(f"target.vocab_size: expected at least {_MIN_VOCAB_SIZE}, got {vocab_size}")
        config = _KINDS[kind](
            num_hidden_layers=num_layers,
            hidden_size=hidden_size,
            num_attention_heads=num_heads,
            num_key_value_heads=num_kv_heads,
            head_dim=hidden_size // num_heads,
            intermediate_size=ffn_size,
            vocab_size=vocab_size,
            max_position_embeddings=max_positions,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=_EOS_ID,
            pad_token_id=_PAD_ID,
        )
        with torch.random.fork_rng(devices=[]):  # transformers initialises from the global generator
            model = AutoModelForCausalLM.from_config(
                config, dtype=parse_dtype(dtype), attn_implementation=attn_implementation
            )
        _draw_weights(model, seed, logit_std)
        self._init_from(model, byte_tokenizer(), name=name, aux_layer_ids=aux_layer_ids, device=device)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose ids 0..255 are the bytes of UTF-8, with ChatML's special tokens behind them."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(_NUM_BYTES)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=_CHATML,
        clean_up_tokenization_spaces=False,
    )


@torch.no_grad()
def _draw_weights(model: Any, seed: int, logit_std: float) -> None:
    """Draws every parameter but the norms in float32, so that all dtypes hold the same model."""
    generator = torch.Generator().manual_seed(seed)
    embedding_std = 1.0 / float(getattr(model.get_input_embeddings(), "embed_scale", 1.0))  # Gemma multiplies by it
    # Experts are [experts, in, out] in gpt-oss, [experts, out, in] elsewhere; linear layers are [out, in].
    experts_input = -2 if any(getattr(module, "is_transposed", False) for module in model.modules()) else -1
    for name, parameter in model.named_parameters():
        if "norm" in name:
            continue
        if "embed_tokens" in name:
            std = embedding_std
        elif "sinks" in name:  # one more logit beside the attention logits, whose standard deviation is about 1
            std = 1.0
        elif parameter.ndim == 1:  # strong biases would drown the context
            std = 0.2
        else:
            std = parameter.shape[experts_input if parameter.ndim == 3 else -1] ** -0.5
        if "lm_head" in name:
            std *= logit_std
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def _llama(**sizes: Any) -> PreTrainedConfig:
    return LlamaConfig(**sizes, rope_parameters={"rope_type": "default", "rope_theta": 10_000.0})


def _gemma3(**sizes: Any) -> PreTrainedConfig:
    return Gemma3TextConfig(
        **sizes,
        sliding_window=_SLIDING_WINDOW,
        layer_types=_every_other_layer_full(sizes["num_hidden_layers"]),
        query_pre_attn_scalar=sizes["head_dim"],
    )


def _gpt_oss(**sizes: Any) -> PreTrainedConfig:
    factor = 4
    return GptOssConfig(
        **sizes,
        sliding_window=_SLIDING_WINDOW,
        layer_types=_every_other_layer_full(sizes["num_hidden_layers"]),
        num_local_experts=4,
        num_experts_per_tok=2,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 150_000.0,
            "factor": float(factor),
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": sizes["max_position_embeddings"] // factor,
        },
    )


def _deepseek_v3(**sizes: Any) -> PreTrainedConfig:
    hidden_size, head_dim = sizes["hidden_size"], sizes.pop("head_dim")
    return DeepseekV3Config(
        **{**sizes, "num_key_value_heads": sizes["num_attention_heads"]},  # latents are expanded to every head
        q_lora_rank=hidden_size // 2,
        kv_lora_rank=hidden_size // 2,
        qk_nope_head_dim=head_dim - head_dim // 2,
        qk_rope_head_dim=head_dim // 2,
        v_head_dim=head_dim,
        first_k_dense_replace=1,
        n_routed_experts=8,
        n_shared_experts=1,
        n_group=4,
        topk_group=2,
        num_experts_per_tok=3,
        moe_intermediate_size=sizes["intermediate_size"] // 4,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    )


def _every_other_layer_full(num_layers: int) -> list[str]:
    return ["full_attention" if layer % 2 else "sliding_attention" for layer in range(num_layers)]


_KINDS = {"llama": _llama, "gemma3": _gemma3, "gpt_oss": _gpt_oss, "deepseek_v3": _deepseek_v3}
