"""What a target says about itself: its head, its decoder layer, its special tokens, its identity."""

from __future__ import annotations

import pytest
import torch
from target_batches import padded, random_tokens
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GenerationConfig,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PreTrainedConfig,
    StableLmConfig,
)

from lkspec.targets.tiny import TinyTarget, byte_tokenizer
from lkspec.targets.transformers import TransformersTarget

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 264,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": 257,
    "pad_token_id": 258,
}


def random_model(config: PreTrainedConfig) -> torch.nn.Module:
    """Weights large enough that a soft cap, a scale or a bias left out shows."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(), torch.no_grad():
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return model


def wrap(model: torch.nn.Module) -> TransformersTarget:
    return TransformersTarget.from_model(model, byte_tokenizer(), name="random", device="cpu")


HEADS = {
    "soft_cap": (Gemma2Config(**SIZES, head_dim=8, query_pre_attn_scalar=8, final_logit_softcapping=7.0), 1.0, 7.0),
    "multiplied": (CohereConfig(**SIZES, logit_scale=0.3), 0.3, None),
    "divided": (GraniteConfig(**SIZES, logits_scaling=8.0), 0.125, None),
    "bias": (PhiConfig(**SIZES), 1.0, None),
    "plain": (LlamaConfig(**SIZES), 1.0, None),
}


@pytest.mark.parametrize("kind", HEADS)
def test_head_is_described_completely(kind):
    config, scale, soft_cap = HEADS[kind]
    model = random_model(config)
    target = wrap(model)
    assert (target.head.scale, target.head.soft_cap) == (scale, soft_cap)
    assert (target.head.bias is not None) == (kind == "bias")
    tokens = random_tokens(1, 12)
    described = target.head.logits(target.states(padded([tokens[0]])).last)
    torch.testing.assert_close(described, model(tokens).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("change", [lambda logits: logits + 0.1, lambda logits: logits.abs(), lambda x: x * 1.01])
def test_head_that_cannot_be_described_is_refused(monkeypatch, change):
    model = random_model(LlamaConfig(**SIZES))
    forward = LlamaForCausalLM.forward

    def changed(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.logits = change(output.logits)
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", changed)
    with pytest.raises(ValueError, match=r"random: its logits are not .*relative error .*head is not supported"):
        wrap(model)


ROPES = {
    "default": {"rope_type": "default", "rope_theta": 5e4},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64},
}


@pytest.mark.parametrize("kind", ROPES)
def test_rope_is_the_models_own(kind):
    model = random_model(LlamaConfig(**SIZES, rope_parameters=ROPES[kind]))
    dims = wrap(model).spec.dims
    torch.testing.assert_close(dims.inv_freq, model.model.rotary_emb.inv_freq, rtol=1e-6, atol=0)
    assert dims.rope_attention_factor == pytest.approx(model.model.rotary_emb.attention_scaling)
    assert dims.rope_parameters["rope_type"] == kind


def test_rope_that_depends_on_the_length_is_refused():
    model = random_model(
        LlamaConfig(**SIZES, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    )
    with pytest.raises(ValueError, match=r"'dynamic' changes with the sequence length.*llama3"):
        wrap(model)


def test_partial_rotation_is_not_passed_on_to_the_draft():
    dims = wrap(random_model(StableLmConfig(**SIZES))).spec.dims
    assert "partial_rotary_factor" not in dims.rope_parameters
    assert dims.inv_freq.shape == (4,)  # half of a whole head of 8


def test_dims_of_each_kind(tiny_target, tiny_gemma3, tiny_gpt_oss):
    for target in (tiny_target, tiny_gemma3, tiny_gpt_oss):
        dims = target.spec.dims
        assert (dims.hidden_size, dims.num_heads, dims.num_kv_heads, dims.head_dim) == (64, 4, 2, 16)
    assert (tiny_target.spec.dims.ffn_size, tiny_gemma3.spec.dims.ffn_size) == (128, 128)
    assert tiny_gpt_oss.spec.dims.ffn_size == 2 * 128  # experts per token * expert width
    full = tiny_gemma3._decoder.rotary_emb.full_attention_inv_freq
    torch.testing.assert_close(tiny_gemma3.spec.dims.inv_freq, full)
    torch.testing.assert_close(tiny_gpt_oss.spec.dims.inv_freq, tiny_gpt_oss._decoder.rotary_emb.inv_freq)
    assert tiny_gpt_oss.spec.dims.rope_attention_factor > 1


def test_spec_is_the_targets_own(tiny_target):
    spec = tiny_target.spec
    assert spec.embedding.equal(tiny_target.model.get_input_embeddings().weight)
    assert spec.head is tiny_target.head
    assert spec.num_aux == 3


def test_every_end_of_text_token_is_found():
    model = random_model(LlamaConfig(**SIZES))
    model.generation_config = GenerationConfig(eos_token_id=[3, 260])
    target = wrap(model)
    assert target.eos_ids == (3, 257, 260)  # 257 is the tokenizer's
    assert target.special_ids == (3, 256, 257, 258, 260)


def test_model_without_end_of_text_is_refused():
    model = random_model(LlamaConfig(**{**SIZES, "eos_token_id": None}))
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="names an end-of-text token"):
        TransformersTarget.from_model(model, tokenizer, name="random", device="cpu")


def test_fingerprint_is_that_of_the_weights():
    first = TinyTarget(device="cpu")
    assert TinyTarget(device="cpu").fingerprint == first.fingerprint
    assert TinyTarget(device="cpu", attn_implementation="eager").fingerprint == first.fingerprint
    assert TinyTarget(device="cpu", dtype="bfloat16").fingerprint == first.fingerprint
    assert TinyTarget(device="cpu", seed=1).fingerprint != first.fingerprint


@pytest.mark.parametrize("name", ["model.layers.5.mlp.up_proj.weight", "lm_head.weight", "model.norm.weight"])
def test_fingerprint_sees_every_parameter(name):
    """A fine-tuned model often keeps its embedding and head."""
    original = TinyTarget(device="cpu")
    model = TinyTarget(device="cpu").model
    with torch.no_grad():
        model.get_parameter(name).mul_(1.1)
    assert TransformersTarget.from_model(model, byte_tokenizer(), name="t").fingerprint != original.fingerprint


def test_target_is_frozen(tiny_target):
    assert not tiny_target.model.training
    assert not any(p.requires_grad for p in tiny_target.model.parameters())
    assert not tiny_target.spec.embedding.requires_grad
    assert not tiny_target.head.weight.requires_grad
    assert tiny_target.num_parameters == sum(p.numel() for p in tiny_target.model.parameters())
