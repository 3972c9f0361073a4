"""EAGLE-3 in the layout of the library speculators."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from export_cases import (
    HALF,
    PLAIN_SHAPES,
    SPECULATORS_CONFIG,
    Stored,
    Tensors,
    V,
    inputs,
    plain_tensors,
    read_folder,
    reopened,
    same_q,
    shapes_of,
    unrolled_q,
    write_folder,
)
from helpers.draft_cases import CASES, make_draft
from helpers.eagle3_reference import Reference
from transformers import LlamaConfig

from lkspec.drafts.eagle3 import Eagle3
from lkspec.export.base import WriteOptions
from lkspec.export.eagle3 import SpeculatorsEagle3
from lkspec.export.reading import Pretrained
from lkspec.targets.dims import decoder_dims
from lkspec.targets.tiny import TinyTarget

OPTIONS = WriteOptions(num_draft_tokens=5)
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def speculators_tensors(target: TinyTarget) -> Tensors:
    """With ``layers.0.`` and a copy of the target's embedding in bfloat16."""
    renamed = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in plain_tensors().items()}
    return {**renamed, "embed_tokens.weight": target.spec.embedding.bfloat16()}


def llama3_frequencies() -> torch.Tensor:
    """Long wavelengths divided by the factor, short ones kept, those between blended."""
    plain = 500.0 ** (-torch.arange(0, 16, 2).double() / 16)
    wavelength = 2 * torch.pi / plain
    blend = ((64 / wavelength - 1.0) / (4.0 - 1.0)).clamp(0, 1)
    return (1 - blend) * plain / 8.0 + blend * plain


@pytest.mark.parametrize("rope", [None, LLAMA3], ids=["plain", "llama3"])
def test_a_public_checkpoint_proposes_what_the_formulas_say(
    rope: dict[str, Any] | None, tiny_target: TinyTarget, tmp_path: Path
) -> None:
    """norm_before_residual, RoPE in the words before transformers 5."""
    config = {**SPECULATORS_CONFIG}
    config["transformer_layer_config"] = {**config["transformer_layer_config"], "rope_scaling": rope}
    folder = write_folder(tmp_path, speculators_tensors(tiny_target), config)
    inv_freq = 500.0 ** (-torch.arange(0, 16, 2) / 16) if rope is None else llama3_frequencies()
    dims = replace(tiny_target.spec.dims, inv_freq=inv_freq)
    weights = {name: tensor for name, tensor in plain_tensors().items() if name not in ("d2t", "t2d")}
    batch, states = inputs(tiny_target)
    hidden = Reference(Stored(weights), dims, norm_before_residual=True).unroll(  # type: ignore[arg-type]
        tiny_target.spec.embedding, batch.tokens[0], states.aux[0], 3
    )
    expected = (hidden @ weights["lm_head.weight"].double().T).softmax(-1)
    q = unrolled_q(reopened(folder, tiny_target), batch, states, 3)[..., HALF.ids]
    known = ~expected.isnan()
    assert known[0, :-1].all()
    assert (q - expected)[known].abs().max() < 1e-5


def test_it_names_auxiliary_layers_in_our_meaning(tiny_target: TinyTarget, tmp_path: Path) -> None:
    config = {**SPECULATORS_CONFIG, "eagle_aux_hidden_state_layer_ids": [1, 2, 7]}
    folder = write_folder(tmp_path, speculators_tensors(tiny_target), config)
    with pytest.raises(ValueError, match=r"set target\.aux_layer_ids=\[1,2,7\]"):
        reopened(folder, tiny_target)
    reopened(folder, TinyTarget(device="cpu", aux_layer_ids=(1, 2, 7)))


def test_a_qwen3_layer_is_refused(tiny_target: TinyTarget, tmp_path: Path) -> None:
    tensors = {**speculators_tensors(tiny_target), "layers.0.self_attn.q_norm.weight": torch.ones(16)}
    folder = write_folder(tmp_path, tensors, SPECULATORS_CONFIG)
    with pytest.raises(ValueError, match=r"no place for layers\.0\.self_attn\.q_norm\.weight \(1 in all\)"):
        reopened(folder, tiny_target)


@pytest.mark.parametrize("key", ["norm_before_fc", "fc_norm", "norm_output"])
def test_norms_that_ours_has_not(key: str, tiny_target: TinyTarget, tmp_path: Path) -> None:
    folder = write_folder(tmp_path, speculators_tensors(tiny_target), {**SPECULATORS_CONFIG, key: True})
    with pytest.raises(ValueError, match=f"config.json says {key}=True"):
        reopened(folder, tiny_target)


def test_a_config_without_its_layer(tiny_target: TinyTarget, tmp_path: Path) -> None:
    config = {key: value for key, value in SPECULATORS_CONFIG.items() if key != "transformer_layer_config"}
    folder = write_folder(tmp_path, speculators_tensors(tiny_target), config)
    with pytest.raises(ValueError, match=r"config\.json has no transformer_layer_config"):
        reopened(folder, tiny_target)


def own_draft(target: TinyTarget) -> Eagle3:
    draft = make_draft(CASES["eagle3_norm_first"], target.spec, HALF)
    assert isinstance(draft, Eagle3)
    return draft


def test_what_is_written(tiny_target: TinyTarget, tmp_path: Path) -> None:
    SpeculatorsEagle3().write(tmp_path, own_draft(tiny_target), tiny_target, OPTIONS)
    tensors, config = read_folder(tmp_path)
    renamed = {name.replace("midlayer.", "layers.0."): shape for name, shape in PLAIN_SHAPES.items()}
    assert shapes_of(tensors) == renamed | {"d2t": (HALF.size,), "t2d": (V,), "embed_tokens.weight": (V, 64)}
    assert torch.equal(tensors["embed_tokens.weight"], tiny_target.spec.embedding)
    layer = config.pop("transformer_layer_config")
    assert config == {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_version": "0.9.0",
        "draft_vocab_size": HALF.size,
        "norm_before_residual": True,
        "target_hidden_size": 64,
        "eagle_aux_hidden_state_layer_ids": [2, 4, 5],
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {
                    "proposal_type": "greedy",
                    "speculative_tokens": 5,
                    "verifier_accept_k": 1,
                    "accept_tolerance": 0.0,
                }
            ],
            "verifier": {"name_or_path": "tiny", "architectures": ["LlamaForCausalLM"]},
        },
        "torch_dtype": "float32",
    }
    assert layer["model_type"] == "llama"
    read = decoder_dims(LlamaConfig(**layer))
    assert (read.hidden_size, read.ffn_size, read.num_kv_heads, layer["vocab_size"]) == (64, 128, 2, V)
    assert torch.equal(read.inv_freq, tiny_target.spec.dims.inv_freq)


@pytest.mark.parametrize("ids", [None, (1, 4, 6)])
def test_there_and_back_with_any_layers(ids: tuple[int, ...] | None, tmp_path: Path) -> None:
    target = TinyTarget(device="cpu", aux_layer_ids=ids)
    draft = own_draft(target)
    SpeculatorsEagle3().write(tmp_path, draft, target, OPTIONS)
    assert same_q(draft, reopened(tmp_path, target), target)
    lines = SpeculatorsEagle3().checks(Pretrained.open(str(tmp_path)).folder, draft, target)
    layers = ", ".join(map(str, target.aux_layer_ids))
    assert lines[0] == f"auxiliary states: those that enter layers {layers} of 8; the config names them"
    assert "norm_before_residual true (vLLM only: SGLang's layer does not know it)" in lines[2]


def test_the_target_is_named_as_others_know_it(tiny_target: TinyTarget, tmp_path: Path) -> None:
    options = replace(OPTIONS, target_id="org/target")
    SpeculatorsEagle3().write(tmp_path, own_draft(tiny_target), tiny_target, options)
    verifier = read_folder(tmp_path)[1]["speculators_config"]["verifier"]
    assert verifier == {"name_or_path": "org/target", "architectures": ["LlamaForCausalLM"]}


def test_it_is_served_by_vllm_only(tiny_target: TinyTarget) -> None:
    (vllm,) = SpeculatorsEagle3().serve_commands(own_draft(tiny_target), "org/target", "out", OPTIONS)
    assert vllm.command == (
        'vllm serve org/target --speculative-config \'{"method": "eagle3", "model": "out", '
        '"num_speculative_tokens": 5, "draft_sample_method": "probabilistic"}\''
    )
