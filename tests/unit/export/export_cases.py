"""Checkpoints written by hand, name by name as the formats are described, and what is compared with them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.draft_cases import batch_for, half_vocab
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lkspec.drafts.base import Draft
from lkspec.export.base import Layout
from lkspec.export.reading import Pretrained
from lkspec.targets.base import Target
from lkspec.types import Batch, TargetStates

V, H, KV, FFN, AUX = 264, 64, 32, 128, 192  # of the tiny Llama; 4 heads of 16, 2 of keys and values
Tensors = dict[str, Tensor]
HALF = half_vocab(V)


def drawn(*shape: int, seed: int, scale: float | None = None) -> Tensor:
    """Weights that keep variances."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator)
    return 1.0 + 0.3 * values if len(shape) == 1 else values * (shape[-1] ** -0.5 if scale is None else scale)


def drawn_all(shapes: Mapping[str, tuple[int, ...]]) -> Tensors:
    """One tensor a name, all different."""
    return {name: drawn(*shape, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}


def write_folder(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], name: str = "model") -> str:
    """A checkpoint folder; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / f"{name}.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def read_folder(folder: Path) -> tuple[Tensors, dict[str, Any]]:
    """All tensors of one file, and the config."""
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    return tensors, json.loads((folder / "config.json").read_text())


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def inputs(target: Target, num_tokens: int = 7) -> tuple[Batch, TargetStates]:
    """One conversation of random tokens with random states."""
    return batch_for(target.spec, [[num_tokens]])


@torch.no_grad()
def unrolled_q(draft: Draft, batch: Batch, states: TargetStates, num_depths: int) -> Tensor:
    """q over the target's vocabulary at every depth and anchor, [K, T, V]."""
    hidden = draft.unroll(batch, states, num_depths)
    logits = torch.stack([draft.head(depth).logits(hidden[depth - 1, 0]) for depth in range(1, num_depths + 1)])
    return draft.vocab.expand(logits.double().softmax(-1))


def same_q(first: Draft, second: Draft, target: Target, num_depths: int = 3) -> bool:
    """Whether two drafts propose alike."""
    batch, states = inputs(target)
    ours, theirs = (unrolled_q(draft, batch, states, num_depths) for draft in (first, second))
    return bool((ours - theirs).abs().max() <= 1e-6)


def reopened(folder: Path | str, target: Target) -> Draft:
    """The draft that a folder holds."""
    return Pretrained.open(str(folder)).build(target)


def assert_q(folder: str, target: Target, expected: Tensor, num_depths: int = 3) -> None:
    """What a folder's draft proposes is ``expected`` [K, T, V], wherever the text is long enough for it to be known."""
    batch, states = inputs(target)
    q = unrolled_q(reopened(folder, target), batch, states, num_depths)
    known = ~expected.isnan()
    assert known[0, :-1].all()
    assert (q - expected)[known].abs().max() < 1e-5


def refusal(folder: str, target: Target) -> str:
    """What opening and building a folder's draft says, without the folder's path in front."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the callers look at it
        reopened(folder, target)
    assert str(caught.value).startswith(f"{folder}: ")
    return str(caught.value).removeprefix(f"{folder}: ")


def changed(tensors: Tensors, without: str | None, more: str | None) -> Tensors:
    """Tensors with one left out, or one more."""
    kept = {name: tensor for name, tensor in tensors.items() if name != without}
    return kept if more is None else {**kept, more: torch.ones(2)}


def checks_after(layout: Layout, folder: Path, draft: Draft, target: Target, **changes: Any) -> list[str]:
    """What is checked of a written draft whose config was changed afterwards."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return layout.checks(Pretrained.open(str(folder)).folder, draft, target)


PLAIN_SHAPES: dict[str, tuple[int, ...]] = {
    "fc.weight": (H, AUX),
    "midlayer.self_attn.q_proj.weight": (H, 2 * H),
    "midlayer.self_attn.k_proj.weight": (KV, 2 * H),
    "midlayer.self_attn.v_proj.weight": (KV, 2 * H),
    "midlayer.self_attn.o_proj.weight": (H, H),
    "midlayer.mlp.gate_proj.weight": (FFN, H),
    "midlayer.mlp.up_proj.weight": (FFN, H),
    "midlayer.mlp.down_proj.weight": (H, FFN),
    "midlayer.input_layernorm.weight": (H,),
    "midlayer.hidden_norm.weight": (H,),
    "midlayer.post_attention_layernorm.weight": (H,),
    "norm.weight": (H,),
    "lm_head.weight": (HALF.size, H),
}
PLAIN_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLMEagle3"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": H,
    "intermediate_size": FFN,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
    "rms_norm_eps": 1e-6,
    "rope_theta": 500.0,
    "max_position_embeddings": 2048,
    "vocab_size": V,
    "draft_vocab_size": HALF.size,
    "tie_word_embeddings": False,
}
LAYER_KEYS = ("hidden_act", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
SPECULATORS_CONFIG: dict[str, Any] = {
    "architectures": ["Eagle3Speculator"],
    "auto_map": {"": "eagle3.Eagle3SpeculatorConfig"},
    "draft_vocab_size": HALF.size,
    "norm_before_residual": True,
    "speculators_model_type": "eagle3",
    "speculators_version": "0.1.0",
    "target_hidden_size": None,
    "eagle_aux_hidden_state_layer_ids": [2, 4, 5],
    "transformer_layer_config": {
        **{key: PLAIN_CONFIG[key] for key in LAYER_KEYS},
        "model_type": "llama",
        "head_dim": 16,
        "num_hidden_layers": 1,
        "rms_norm_eps": 1e-6,
        "rope_theta": 500.0,
        "vocab_size": V,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,  # of the verifier, whose config was copied
    },
    "speculators_config": {
        "algorithm": "eagle3",
        "default_proposal_method": "greedy",
        "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 3}],
        "verifier": {"name_or_path": "org/target", "architectures": ["LlamaForCausalLM"]},
    },
}


def plain_tensors() -> Tensors:
    """A random EAGLE-3 draft with every second token, by its released names."""
    offsets = HALF.ids - torch.arange(HALF.size)
    membership = torch.zeros(V, dtype=torch.bool)
    membership[HALF.ids] = True
    return drawn_all(PLAIN_SHAPES) | {"d2t": offsets, "t2d": membership}


class Stored:
    """Tensors in place of a draft, for the float64 reference."""

    def __init__(self, tensors: Tensors) -> None:
        self._tensors = tensors

    def state_dict(self) -> Tensors:
        return self._tensors
