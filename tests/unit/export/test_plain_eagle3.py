"""EAGLE-3 in the plain layout: public checkpoints in, our drafts out."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from export_cases import (
    FFN,
    HALF,
    PLAIN_CONFIG,
    PLAIN_SHAPES,
    Stored,
    Tensors,
    V,
    assert_q,
    checks_after,
    drawn,
    inputs,
    plain_tensors,
    read_folder,
    refusal,
    reopened,
    same_q,
    shapes_of,
    write_folder,
)
from helpers.draft_cases import CASES, make_draft
from helpers.eagle3_reference import Reference
from transformers import AutoConfig

from lkspec.drafts.eagle3 import Eagle3
from lkspec.export.base import WriteOptions
from lkspec.export.eagle3 import PlainEagle3
from lkspec.export.reading import Pretrained
from lkspec.targets.dims import decoder_dims
from lkspec.targets.tiny import TinyTarget
from lkspec.vocab import DraftVocab

OPTIONS = WriteOptions(num_draft_tokens=3)
INV_FREQ = 500.0 ** (-torch.arange(0, 16, 2) / 16)


def exact_q(tensors: Tensors, target: TinyTarget, *, norm_before_residual: bool = False) -> torch.Tensor:
    """q of a plain checkpoint in float64, [3, T, V], by loops over anchors."""
    batch, states = inputs(target)
    dims = replace(target.spec.dims, inv_freq=INV_FREQ, rope_attention_factor=1.0)
    weights = {name: tensor.float() for name, tensor in tensors.items() if name not in ("d2t", "t2d")}
    hidden = Reference(Stored(weights), dims, norm_before_residual).unroll(  # type: ignore[arg-type]
        target.spec.embedding, batch.tokens[0], states.aux[0], 3
    )
    wide = torch.zeros(*hidden.shape[:2], V, dtype=torch.float64)
    wide[..., torch.arange(HALF.size) + tensors["d2t"]] = (hidden @ tensors["lm_head.weight"].double().T).softmax(-1)
    return wide


# --- public checkpoints ---------------------------------------------------------------------------------------------


def with_prefix(tensors: Tensors) -> Tensors:
    return {f"model.{name}": tensor for name, tensor in tensors.items()}


def with_alias(tensors: Tensors) -> Tensors:
    return {name.replace("midlayer.", "layers.0."): tensor for name, tensor in tensors.items()}


def with_buffers(tensors: Tensors) -> Tensors:
    return {**tensors, "midlayer.self_attn.rotary_emb.inv_freq": torch.ones(8)}


def without_t2d(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if name != "t2d"}


def by_frequency(tensors: Tensors) -> Tensors:
    """Draft ids in another order than target ids."""
    order = torch.randperm(HALF.size, generator=torch.Generator().manual_seed(3))
    ids = HALF.ids[order]
    return {**tensors, "lm_head.weight": tensors["lm_head.weight"][order], "d2t": ids - torch.arange(HALF.size)}


WRITTEN: dict[str, Callable[[Tensors], Tensors]] = {
    "as described": dict,
    "prefix": with_prefix,
    "layers.0": with_alias,
    "prefix and layers.0": lambda tensors: with_prefix(with_alias(tensors)),
    "buffers": with_buffers,
    "without t2d": without_t2d,
    "by frequency": by_frequency,
}


@pytest.mark.parametrize("how", WRITTEN)
def test_a_public_checkpoint_proposes_what_the_formulas_say(how: str, tiny_target: TinyTarget, tmp_path: Path) -> None:
    """With RoPE of its own config (theta 500), not of the target's (10,000)."""
    tensors = plain_tensors()
    assert_q(write_folder(tmp_path, WRITTEN[how](tensors), PLAIN_CONFIG), tiny_target, exact_q(tensors, tiny_target))


def test_norm_before_residual(tiny_target: TinyTarget, tmp_path: Path) -> None:
    tensors = plain_tensors()
    folder = write_folder(tmp_path, tensors, {**PLAIN_CONFIG, "norm_before_residual": True})
    expected = exact_q(tensors, tiny_target, norm_before_residual=True)
    assert (expected - exact_q(tensors, tiny_target)).nan_to_num().abs().max() > 1e-2
    assert_q(folder, tiny_target, expected)


def test_pickled_and_in_half_precision(tiny_target: TinyTarget, tmp_path: Path) -> None:
    """As the first drafts were released: pytorch_model.bin in float16, with a copy of the target's embedding."""
    tensors = {
        name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in plain_tensors().items()
    }
    copy = tiny_target.spec.embedding.half()
    torch.save({**tensors, "embed_tokens.weight": copy}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(PLAIN_CONFIG))
    assert_q(str(tmp_path), tiny_target, exact_q(tensors, tiny_target))


def test_plain_llama_as_the_architecture(tiny_target: TinyTarget, tmp_path: Path) -> None:
    tensors = plain_tensors()
    folder = write_folder(tmp_path, tensors, {**PLAIN_CONFIG, "architectures": ["LlamaForCausalLM"]})
    assert_q(folder, tiny_target, exact_q(tensors, tiny_target))


def test_a_whole_vocabulary_has_no_d2t(tiny_target: TinyTarget, tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in plain_tensors().items() if name not in ("d2t", "t2d")}
    tensors["lm_head.weight"] = drawn(V, 64, seed=50)
    config = {key: value for key, value in PLAIN_CONFIG.items() if key != "draft_vocab_size"}
    draft = reopened(write_folder(tmp_path, tensors, config), tiny_target)
    assert draft.vocab.is_full
    assert torch.equal(draft.head(1).weight.detach(), tensors["lm_head.weight"])


def test_what_a_run_would_say_of_it(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, plain_tensors(), PLAIN_CONFIG)
    assert Pretrained.open(folder).settings == {
        "_target_": "lkspec.drafts.eagle3.Eagle3",
        "head_init": "random",
        "norm_before_residual": False,
        "layer": {
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "intermediate_size": FFN,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        },
        "paper_eta": 3.0,
    }


def refused(folder: Path, target: TinyTarget, *, tensors: Tensors | None = None, **config: Any) -> str:
    """What opening and building says, without the folder's path in front."""
    path = write_folder(folder, plain_tensors() if tensors is None else tensors, {**PLAIN_CONFIG, **config})
    return refusal(path, target)


@pytest.mark.parametrize("name", sorted(PLAIN_SHAPES))
def test_a_missing_tensor_is_named(name: str, tiny_target: TinyTarget, tmp_path: Path) -> None:
    tensors = plain_tensors()
    del tensors[name]
    assert refused(tmp_path, tiny_target, tensors=tensors) == f"there is no tensor {name}"


@pytest.mark.parametrize("name", ["midlayer.self_attn.q_norm.weight", "layers.1.mlp.up_proj.weight", "fc.bias"])
def test_an_unknown_tensor_is_named(name: str, tiny_target: TinyTarget, tmp_path: Path) -> None:
    tensors = {**plain_tensors(), name: torch.ones(2)}
    assert refused(tmp_path, tiny_target, tensors=tensors) == f"no place for {name} (1 in all)"


def test_a_tensor_of_another_shape(tiny_target: TinyTarget, tmp_path: Path) -> None:
    tensors = {**plain_tensors(), "fc.weight": torch.ones(64, 128)}
    message = refused(tmp_path, tiny_target, tensors=tensors)
    assert message == "fc.weight is [64, 128] there, [64, 192] in this draft"


def test_one_tensor_under_two_names(tiny_target: TinyTarget, tmp_path: Path) -> None:
    tensors = {**plain_tensors(), "model.fc.weight": torch.ones(64, 192)}
    assert refused(tmp_path, tiny_target, tensors=tensors) == (
        "fc.weight and model.fc.weight are the same tensor of this format"
    )


def test_another_embedding(tiny_target: TinyTarget, tmp_path: Path) -> None:
    foreign = tiny_target.spec.embedding.clone()
    foreign[5, 7] += 0.1
    for tensor in (foreign, foreign[:-1]):
        message = refused(tmp_path, tiny_target, tensors={**plain_tensors(), "embed_tokens.weight": tensor})
        assert message.startswith("embed_tokens.weight is not the target's own, but lkspec's drafts share that tensor")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({3: V}, f"d2t must hold offsets to different tokens of the target's {V}; it leads to 1..267, 132 of 132"),
        ({3: -4}, f"d2t must hold offsets to different tokens of the target's {V}; it leads to -1..263, 132 of 132"),
        ({3: 2}, "d2t must hold offsets to different tokens of the target's 264; it leads to 1..263, 131 of 132"),
        ({3: 5}, "d2t and t2d name different tokens"),
    ],
)
def test_offsets_that_make_no_vocabulary(
    change: dict[int, int], message: str, tiny_target: TinyTarget, tmp_path: Path
) -> None:
    tensors = plain_tensors()
    for index, value in change.items():
        tensors["d2t"][index] = value
    assert refused(tmp_path, tiny_target, tensors=tensors).startswith(message)


def test_a_small_vocabulary_without_d2t(tiny_target: TinyTarget, tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in plain_tensors().items() if name not in ("d2t", "t2d")}
    assert refused(tmp_path, tiny_target, tensors=tensors) == (
        "there is no tensor d2t for its 132 of the target's 264 tokens"
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_act": "gelu"}, "config.json says hidden_act='gelu', but lkspec's draft of this kind has"),
        ({"attention_bias": True}, "config.json says attention_bias=True"),
        ({"num_hidden_layers": 2}, "config.json says num_hidden_layers=2"),
        ({"norm_before_fc": True}, "config.json says norm_before_fc=True"),
        ({"logit_scale": 0.5}, "config.json says logit_scale=0.5"),
        ({"sliding_window": 512}, "its layer has a sliding window, which lkspec's EAGLE-3 has not"),
        ({"hidden_size": 32}, "made for a target with hidden_size 32, tiny has 64"),
        ({"vocab_size": 300}, "made for a target with vocab_size 300, tiny has 264"),
    ],
)
def test_a_draft_of_another_kind_or_target(
    config: dict[str, Any], message: str, tiny_target: TinyTarget, tmp_path: Path
) -> None:
    assert refused(tmp_path, tiny_target, **config).startswith(message)


def test_a_config_without_dimensions(tiny_target: TinyTarget, tmp_path: Path) -> None:
    config = {key: value for key, value in PLAIN_CONFIG.items() if key not in ("hidden_size", "intermediate_size")}
    path = write_folder(tmp_path, plain_tensors(), config)
    with pytest.raises(ValueError, match=r"config\.json has no hidden_size, intermediate_size$"):
        reopened(path, tiny_target)


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        ({"eagle_aux_hidden_state_layer_ids": [1, 3, 6]}, "[1,3,6]"),  # vLLM's: what enters layer i
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 3, 6]}}, "[2,4,7]"),  # SGLang's: its output
    ],
)
def test_named_auxiliary_layers(config: dict[str, Any], layers: str, tiny_target: TinyTarget, tmp_path: Path) -> None:
    message = refused(tmp_path, tiny_target, **config)
    assert "but tiny gives those of [2, 4, 5]; set target.aux_layer_ids=" + layers in message
    fitting = TinyTarget(device="cpu", aux_layer_ids=tuple(json.loads(layers)))
    assert isinstance(reopened(tmp_path, fitting), Eagle3)


def test_the_defaults_are_layers_2_the_middle_and_3_before_the_end(tiny_target: TinyTarget, tmp_path: Path) -> None:
    path = write_folder(tmp_path, plain_tensors(), {**PLAIN_CONFIG, "eagle_config": {"use_aux_hidden_state": True}})
    assert tiny_target.aux_layer_ids == (2, 4, 5)
    reopened(path, tiny_target)
    other = TinyTarget(device="cpu", aux_layer_ids=(1, 4, 5))
    with pytest.raises(ValueError, match=r"set target\.aux_layer_ids=\[2,4,5\]"):
        reopened(path, other)
    small = TinyTarget(device="cpu", num_layers=4, aux_layer_ids=(0, 1, 2))
    with pytest.raises(ValueError, match=r"the defaults .* collide for the 4 layers"):
        reopened(path, small)


# --- our drafts ---------------------------------------------------------------------------------------------------


def exported(folder: Path, target: TinyTarget, draft: Eagle3) -> Path:
    folder.mkdir(exist_ok=True)
    PlainEagle3().write(folder, draft, target, OPTIONS)
    return folder


def own_draft(target: TinyTarget, vocab: DraftVocab | None = HALF, case: str = "eagle3") -> Eagle3:
    draft = make_draft(CASES[case], target.spec, vocab)
    assert isinstance(draft, Eagle3)
    return draft


def test_what_is_written(tiny_target: TinyTarget, tmp_path: Path) -> None:
    draft = own_draft(tiny_target)
    tensors, config = read_folder(exported(tmp_path, tiny_target, draft))
    assert shapes_of(tensors) == PLAIN_SHAPES | {"d2t": (HALF.size,), "t2d": (V,)}
    assert tensors["d2t"].dtype == torch.int64
    assert torch.equal(torch.arange(HALF.size) + tensors["d2t"], HALF.ids)
    assert tensors["t2d"].dtype == torch.bool
    assert tensors["t2d"].nonzero()[:, 0].tolist() == HALF.ids.tolist()
    assert config == {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_size": 64,
        "hidden_act": "silu",
        "num_hidden_layers": 1,
        "vocab_size": V,
        "draft_vocab_size": HALF.size,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": FFN,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "rope_theta": 10_000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "norm_before_residual": False,
        "torch_dtype": "float32",
    }


def test_a_whole_vocabulary_is_written_without_maps(tiny_target: TinyTarget, tmp_path: Path) -> None:
    draft = own_draft(tiny_target, None)
    tensors, config = read_folder(exported(tmp_path, tiny_target, draft))
    assert shapes_of(tensors) == PLAIN_SHAPES | {"lm_head.weight": (V, 64)}
    assert config["draft_vocab_size"] == V  # SGLang takes the target's head where it is not said
    assert same_q(draft, reopened(tmp_path, tiny_target), tiny_target)


@pytest.mark.parametrize("case", ["eagle3", "eagle3_norm_first"])
@pytest.mark.parametrize("name", ["tiny_target", "tiny_gemma3", "tiny_gpt_oss"])
def test_there_and_back(name: str, case: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """For targets with RoPE by layer type and with YaRN as well; transformers reads the same RoPE from the config."""
    target = request.getfixturevalue(name)
    draft = own_draft(target, case=case)
    again = reopened(exported(tmp_path, target, draft), target)
    assert same_q(draft, again, target)
    read = decoder_dims(AutoConfig.from_pretrained(tmp_path))
    assert torch.equal(read.inv_freq, target.spec.dims.inv_freq)
    assert read.rope_attention_factor == target.spec.dims.rope_attention_factor
    assert (read.num_heads, read.num_kv_heads, read.head_dim, read.rms_norm_eps, read.max_positions) == (
        4, 2, 16, target.spec.dims.rms_norm_eps, 2048,
    )  # fmt: skip


def test_other_layers_than_the_defaults_are_refused(tmp_path: Path) -> None:
    target = TinyTarget(device="cpu", aux_layer_ids=(1, 4, 5))
    with pytest.raises(ValueError, match=r"format=vllm names no auxiliary layers.*format=speculators names them"):
        exported(tmp_path, target, own_draft(target))


def test_two_auxiliary_states_are_refused() -> None:
    target = TinyTarget(device="cpu", aux_layer_ids=(2, 4))
    with pytest.raises(ValueError, match="EAGLE-3 in engines reads 3 auxiliary states, this draft 2"):
        PlainEagle3().stored(own_draft(target), {})


def test_what_is_checked(tiny_target: TinyTarget, tmp_path: Path) -> None:
    draft = own_draft(tiny_target)
    lines = checks_after(PlainEagle3(), exported(tmp_path, tiny_target, draft), draft, tiny_target)
    assert [line.partition(":")[0] for line in lines] == [
        "auxiliary states",
        "RoPE",
        "norms",
        "positions",
        "vocabulary",
    ]
    assert lines[0].startswith("auxiliary states: those that enter layers 2, 4, 5 of 8, the default of vLLM and SGLang")
    assert lines[1] == "RoPE: default, theta 10000, head size 16: as in training, the same as the target's"
    assert lines[3] == "positions: 2,048, as the target"
    lacking = [token for token in tiny_target.special_ids if token % 2 == 0]
    assert lines[4].endswith(f"it lacks the target's special tokens {lacking}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, "does not describe the draft's rope_param"),
        ({"rms_norm_eps": 1e-5}, "does not describe the draft's rms_norm_eps$"),
        ({"max_position_embeddings": 512}, "does not describe the draft's max_position_embeddings$"),
        ({"eagle_aux_hidden_state_layer_ids": [1, 2, 3]}, r"set target\.aux_layer_ids=\[1,2,3\]"),
    ],
)
def test_a_config_that_is_not_the_drafts(
    changes: dict[str, Any], message: str, tiny_target: TinyTarget, tmp_path: Path
) -> None:
    draft = own_draft(tiny_target)
    with pytest.raises(ValueError, match=message):
        checks_after(PlainEagle3(), exported(tmp_path, tiny_target, draft), draft, tiny_target, **changes)


def test_another_vocabulary_than_the_drafts(tiny_target: TinyTarget, tmp_path: Path) -> None:
    folder = exported(tmp_path, tiny_target, own_draft(tiny_target))
    other = own_draft(tiny_target, DraftVocab(HALF.ids - 1, V))
    with pytest.raises(ValueError, match="the rows of its heads are not the tokens of the draft's vocabulary"):
        checks_after(PlainEagle3(), folder, other, tiny_target)


def test_how_it_is_served(tiny_target: TinyTarget) -> None:
    vllm, sglang = PlainEagle3().serve_commands(own_draft(tiny_target), "org/target", "out", OPTIONS)
    assert vllm.command == (
        'vllm serve org/target --speculative-config \'{"method": "eagle3", "model": "out", '
        '"num_speculative_tokens": 3, "draft_sample_method": "probabilistic"}\''
    )
    assert sglang.command == (
        "python -m sglang.launch_server --model-path org/target --speculative-algorithm EAGLE3 "
        "--speculative-draft-model-path out --speculative-num-steps 3 --speculative-eagle-topk 1 "
        "--speculative-num-draft-tokens 4 --speculative-use-rejection-sampling"
    )
    only = PlainEagle3().serve_commands(own_draft(tiny_target, case="eagle3_norm_first"), "org/target", "out", OPTIONS)
    assert [command.engine for command in only] == ["vLLM"]  # SGLang does not know norm_before_residual
