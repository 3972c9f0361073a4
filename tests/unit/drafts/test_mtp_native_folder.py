"""MTP modules out of released checkpoints: what is opened of a folder, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.mtp_checkpoints import KINDS, MODULE_SHARD, TARGET_SHARD, V, load_native, made

from lkspec.drafts.mtp import MTP
from lkspec.targets.tiny import TinyTarget
from lkspec.vocab import DraftVocab

FULL = DraftVocab.full(V)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def test_the_targets_shard_is_not_opened(kind: str, tmp_path: Path) -> None:
    checkpoint, spec = made(kind)
    folder = checkpoint.write(tmp_path)
    (tmp_path / TARGET_SHARD).unlink()
    draft, other = (MTP(spec, FULL, layer_init="random") for _ in range(2))
    load_native(draft, folder)
    load_native(other, checkpoint.write(tmp_path / "whole"))
    for name, tensor in draft.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    (tmp_path / MODULE_SHARD).unlink()
    with pytest.raises(ValueError, match=rf"{MODULE_SHARD}, which holds .*, is not there"):
        load_native(draft, folder)


def refusal(kind: str, folder: Path, **changes) -> str:
    """What loading a checkpoint with these changes says."""
    checkpoint, spec = made(kind)
    draft = MTP(spec, FULL, layer_init="random")
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the callers look at it
        load_native(draft, checkpoint.write(folder, **changes))
    return str(caught.value)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("deepseek", "model.layers.3.enorm.weight"),
        ("deepseek", "model.layers.3.self_attn.kv_b_proj.weight"),
        ("deepseek", "model.layers.3.mlp.gate.e_score_correction_bias"),
        ("deepseek", "model.layers.3.mlp.experts.7.up_proj.weight"),
        ("deepseek_without_q_lora", "model.layers.3.self_attn.q_proj.weight"),
        ("qwen3_next", "mtp.fc.weight"),
        ("qwen3_next", "mtp.layers.0.mlp.shared_expert_gate.weight"),
    ],
)
def test_a_missing_tensor(kind: str, name: str, tmp_path: Path) -> None:
    assert refusal(kind, tmp_path, without=(name,)) == f"{tmp_path}: there is no tensor {name}"


@pytest.mark.parametrize(
    ("kind", "theirs", "ours"),
    [
        ("deepseek", "model.layers.3.eh_proj.weight", "eh_proj.weight"),
        ("deepseek", "model.layers.3.self_attn.o_proj.weight", "layer.layer.self_attn.o_proj.weight"),
        ("qwen3_next", "mtp.layers.0.self_attn.q_norm.weight", "layer.layer.self_attn.q_norm.weight"),
    ],
)
def test_a_tensor_of_another_shape(kind: str, theirs: str, ours: str, tmp_path: Path) -> None:
    whole = made(kind)[0].stored[theirs]
    message = refusal(kind, tmp_path, changed={theirs: whole[:-1]})
    shapes = [whole.shape[0] - 1, *whole.shape[1:]], list(whole.shape)
    assert message == f"{tmp_path}: {ours} is {shapes[0]} there, {shapes[1]} in this draft"


def test_experts_of_another_width(tmp_path: Path) -> None:
    stored = made("qwen3_next")[0].stored
    changed = {name: tensor[:-1] for name, tensor in stored.items() if ".experts." in name and "down" not in name}
    message = refusal("qwen3_next", tmp_path, changed=changed)
    assert "layer.layer.mlp.experts.gate_up_proj is [6, 38, 24] there, [6, 40, 24] in this draft" in message


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("deepseek", "model.layers.3.self_attn.q_norm.weight"),
        ("deepseek", "model.layers.3.mlp.experts.8.up_proj.weight"),
        ("qwen3_next", "mtp.layers.1.input_layernorm.weight"),
    ],
)
def test_a_tensor_that_has_no_place(kind: str, name: str, tmp_path: Path) -> None:
    message = refusal(kind, tmp_path, changed={name: torch.zeros(3)})
    assert message == f"{tmp_path}: no place for {name} (1 in all)"


@pytest.mark.parametrize("name", ["embed_tokens.weight", "shared_head.head.weight"])
def test_a_copy_that_is_not_the_targets(name: str, tmp_path: Path) -> None:
    """Which must be one of the whole vocabulary, and may be left out."""
    checkpoint, spec = made("deepseek")
    name = checkpoint.prefix + name
    foreign = checkpoint.stored[name].clone()
    foreign[5, 7] += 0.5
    for changed in (foreign, foreign[:-1]):
        message = refusal("deepseek", tmp_path, changed={name: changed})
        assert f"{name} is not the target's own, but lkspec's drafts share that tensor with the target" in message
    load_native(MTP(spec, FULL), checkpoint.write(tmp_path, without=(name,)))


def test_a_checkpoint_saved_without_its_module(kind: str, tmp_path: Path) -> None:
    """As transformers saves such a target."""
    checkpoint, _ = made(kind)
    message = refusal(kind, tmp_path, without=tuple(checkpoint.stored))
    assert message == (f"{tmp_path}: no tensor {checkpoint.prefix}*: this checkpoint was saved without MTP")


def test_a_target_without_such_a_module(tiny_target: TinyTarget, tmp_path: Path) -> None:
    tiny_target.model.save_pretrained(tmp_path)
    draft = MTP(tiny_target.spec, DraftVocab.full(tiny_target.vocab_size))
    assert draft.served_by == "research only: no engine serves an MTP module for a target of this kind"
    with pytest.raises(ValueError, match=r"targets of type llama have no MTP module of their own; use draft=mtp"):
        load_native(draft, str(tmp_path))


def test_fp8_without_scales(tmp_path: Path) -> None:
    name = "model.layers.3.self_attn.q_a_proj.weight"
    message = refusal("deepseek_yarn_fp8", tmp_path, without=(f"{name}_scale_inv",))
    assert message == f"{tmp_path}: {name} is torch.float8_e4m3fn, but its scales {name}_scale_inv are not there"


def test_the_number_of_layers_is_the_folders(tmp_path: Path) -> None:
    """The module of a checkpoint with more layers than this target's is not looked for at the wrong place."""
    checkpoint, spec = made("deepseek")
    folder = checkpoint.write(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    with pytest.raises(ValueError, match=r"no tensor model\.layers\.4\.\*: this checkpoint was saved without MTP"):
        load_native(MTP(spec, FULL), folder)
