from __future__ import annotations

import importlib.util

import pytest
import torch
from target_batches import packed, random_tokens
from transformers import (
    AutoModelForCausalLM,
    Gemma4TextConfig,
    GPT2Config,
    Lfm2Config,
    MambaConfig,
    PreTrainedConfig,
    Qwen3NextConfig,
)

from lkspec.targets.tiny import TinyTarget, byte_tokenizer
from lkspec.targets.transformers import TransformersTarget, parse_dtype

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 264,
    "eos_token_id": 257,
    "pad_token_id": 258,
    "bos_token_id": 256,
}


def wrap(config: PreTrainedConfig) -> TransformersTarget:
    with torch.random.fork_rng():
        model = AutoModelForCausalLM.from_config(config)
    return TransformersTarget.from_model(model, byte_tokenizer(), name="some-model", device="cpu")


def test_recurrent_layers_are_refused_by_name():
    linear = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8}
    experts = {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
    config = Qwen3NextConfig(**SIZES, **linear, **experts, head_dim=8, linear_value_head_dim=8)
    with pytest.raises(ValueError, match=r"some-model: layers of type linear_attention .*rejected tokens"):
        wrap(config)


def test_convolutional_layers_are_refused_by_name():
    with pytest.raises(ValueError, match="some-model: layers of type conv are not supported"):
        wrap(Lfm2Config(**SIZES, full_attn_idxs=[2, 5]))


def test_state_space_model_is_refused_by_name():
    config = MambaConfig(hidden_size=32, num_hidden_layers=8, vocab_size=264, state_size=4, eos_token_id=257)
    with pytest.raises(ValueError, match="some-model: layers of type linear_attention are not supported"):
        wrap(config)


def test_model_of_another_layout_is_refused():
    config = GPT2Config(n_embd=32, n_layer=8, n_head=4, vocab_size=264, eos_token_id=257, bos_token_id=256)
    with pytest.raises(ValueError, match=r"must have `layers` and take `position_ids`, GPT2Model does not"):
        wrap(config)


def test_layers_of_different_sizes_are_refused():
    config = Gemma4TextConfig(**SIZES, head_dim=8, global_head_dim=16, vocab_size_per_layer_input=264)
    with pytest.raises(ValueError, match="some-model: its layers differ in head_dim"):
        wrap(config)


def test_missing_flash_attention_names_the_extra(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "flash_attn" else find_spec(name, *rest)
    )
    with pytest.raises(ValueError, match=r"pip install 'lkspec\[flash\]'.*attn_implementation=sdpa"):
        TransformersTarget("any", attn_implementation="flash_attention_2")


def test_flash_attention_cannot_take_explicit_masks():
    target = TinyTarget(device="cpu")
    target.attn_implementation = "flash_attention_2"
    tokens = random_tokens(1, 4)
    with pytest.raises(ValueError, match=r"set target\.attn_implementation=sdpa"):
        target.step(tokens, torch.arange(4)[None], target.new_cache(1))
    with pytest.raises(ValueError, match=r"set target\.attn_implementation=sdpa"):
        target.states(packed([[tokens[0], tokens[0]]]))


@pytest.mark.parametrize("name", ["float64", "fp16", ""])
def test_unknown_dtype(name):
    with pytest.raises(ValueError, match=rf"expected one of float32, bfloat16, float16, got '{name}'"):
        parse_dtype(name)
    with pytest.raises(ValueError, match="dtype: expected one of"):
        TransformersTarget("any", dtype=name)


@pytest.mark.parametrize("path", ["no/such-model", "nothing-here", "/no/such/folder"])
def test_path_without_a_model(path):
    with pytest.raises(ValueError, match=f"target.path: expected a model folder or a hub id.*{path}"):
        TransformersTarget(path)


def test_folder_without_a_model(tmp_path):
    with pytest.raises(ValueError, match=r"target\.path: expected a model folder or a hub id"):
        TransformersTarget(str(tmp_path))


def test_folder_without_weights(tmp_path, tiny_target):
    tiny_target.model.config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"target\.path: expected a model folder .*safetensors"):
        TransformersTarget(str(tmp_path))


def test_folder_without_a_tokenizer(tmp_path, tiny_target):
    tiny_target.model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"target\.path: expected a model folder"):
        TransformersTarget(str(tmp_path))


def test_saved_model_is_read_back(tmp_path, tiny_target):
    tiny_target.model.save_pretrained(tmp_path / "my-model")
    tiny_target.tokenizer.save_pretrained(tmp_path / "my-model")
    target = TransformersTarget(str(tmp_path / "my-model"), device="cpu")
    assert target.name == "my-model"
    assert target.fingerprint == tiny_target.fingerprint
    assert target.eos_ids == tiny_target.eos_ids == (257,)
    assert target.special_ids == tiny_target.special_ids
    half = TransformersTarget(str(tmp_path / "my-model"), device="cpu", dtype="bfloat16", name="half")
    assert (half.name, half.dtype, half.fingerprint) == ("half", torch.bfloat16, tiny_target.fingerprint)
