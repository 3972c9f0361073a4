"""Tiny random checkpoints in the layouts that DeepSeek-V3 and Qwen3-Next are released in, and targets for them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DeepseekV3Config, PreTrainedConfig, Qwen3NextConfig

from lkspec.drafts.mtp import MTP
from lkspec.export.reading import Pretrained, fill
from lkspec.targets.decoder_layer import StandaloneLayer
from lkspec.targets.tiny import byte_tokenizer
from lkspec.targets.transformers import TransformersTarget
from lkspec.types import DecoderDims, LinearHead, TargetSpec

V = 264
EPS = 1e-3
TARGET_SHARD, MODULE_SHARD = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
BLOCK = 128
Tensors = dict[str, Tensor]

# 144 and 136 are more than one block and no multiple of it.
_DEEPSEEK = {
    "hidden_size": 144,
    "intermediate_size": 40,
    "moe_intermediate_size": 136,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": 20,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 6,
    "v_head_dim": 10,
    "first_k_dense_replace": 2,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 3,
    "routed_scaling_factor": 2.5,
}
_QWEN = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "moe_intermediate_size": 20,  # torch's grouped products want rows of whole 16 bytes
    "shared_expert_intermediate_size": 18,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "partial_rotary_factor": 0.5,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_SHARED = {
    "vocab_size": V,
    "rms_norm_eps": EPS,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 0.7,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 32,
}


@dataclass
class Checkpoint:
    """What a folder is written from: ``stored`` tensors of the module, by their released names, and of the target."""

    model: Any
    prefix: str
    stored: Tensors
    quantized: bool = False

    @property
    def config(self) -> PreTrainedConfig:
        return self.model.config

    def weights(self) -> Tensors:
        """The module's tensors in float64, without the prefix, every weight dequantised entry by entry."""
        values = {}
        for name, tensor in self.stored.items():
            if name.endswith("_scale_inv"):
                continue
            scales = self.stored.get(f"{name}_scale_inv")
            values[name.removeprefix(self.prefix)] = tensor.double() if scales is None else by_entry(tensor, scales)
        return values

    def write(self, folder: Path, *, without: tuple[str, ...] = (), changed: Mapping[str, Tensor] | None = None) -> str:
        """Two shards, their index and the config; returns the folder's name."""
        module = {**self.stored, **(changed or {})}
        module = {name: tensor.contiguous() for name, tensor in module.items() if name not in without}
        shards = {TARGET_SHARD: released(self.model.state_dict()), MODULE_SHARD: module}
        folder.mkdir(parents=True, exist_ok=True)
        for shard, tensors in shards.items():
            save_file(tensors, folder / shard, metadata={"format": "pt"})
        weight_map = {name: shard for shard, tensors in shards.items() for name in tensors}
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        config = self.config.to_dict() | {"architectures": [type(self.model).__name__], "dtype": "bfloat16"}
        if self.quantized:
            config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK]}
        (folder / "config.json").write_text(json.dumps(config))
        return str(folder)


def deepseek(*, q_lora: bool = True, yarn: bool = False, fp8: bool = False) -> Checkpoint:
    """Two dense layers and one of experts; the module is layer 3."""
    rope = YARN if yarn else {"rope_type": "default", "rope_theta": 100.0}
    sizes = _DEEPSEEK if q_lora else {**_DEEPSEEK, "q_lora_rank": None}
    model = _random_model(DeepseekV3Config(**sizes, **_SHARED, rope_parameters=rope))
    c, generator = model.config, torch.Generator().manual_seed(1)
    size, heads = c.hidden_size, c.num_attention_heads
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("enorm.weight", "hnorm.weight"), (size,))
    shapes |= {"eh_proj.weight": (size, 2 * size), "shared_head.norm.weight": (size,)}
    shapes |= {"input_layernorm.weight": (size,), "post_attention_layernorm.weight": (size,)}
    query = heads * (c.qk_nope_head_dim + c.qk_rope_head_dim)
    attention = {
        "kv_a_proj_with_mqa.weight": (c.kv_lora_rank + c.qk_rope_head_dim, size),
        "kv_a_layernorm.weight": (c.kv_lora_rank,),
        "kv_b_proj.weight": (heads * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank),
        "o_proj.weight": (size, heads * c.v_head_dim),
    }
    if q_lora:
        attention |= {
            "q_a_proj.weight": (c.q_lora_rank, size),
            "q_a_layernorm.weight": (c.q_lora_rank,),
            "q_b_proj.weight": (query, c.q_lora_rank),
        }
    else:
        attention["q_proj.weight"] = (query, size)
    shapes |= {f"self_attn.{name}": shape for name, shape in attention.items()}
    experts = {f"mlp.experts.{i}": c.moe_intermediate_size for i in range(c.n_routed_experts)}
    shapes |= _mlp_shapes(size, {**experts, "mlp.shared_experts": c.n_shared_experts * c.moe_intermediate_size})
    shapes |= {"mlp.gate.weight": (c.n_routed_experts, size), "mlp.gate.e_score_correction_bias": (c.n_routed_experts,)}
    prefix = f"model.layers.{c.num_hidden_layers}."
    stored = {prefix + name: _draw(name, shape, generator) for name, shape in shapes.items()}
    stored[f"{prefix}embed_tokens.weight"] = model.model.embed_tokens.weight.detach().bfloat16()
    stored[f"{prefix}shared_head.head.weight"] = model.lm_head.weight.detach().bfloat16()
    return Checkpoint(model, prefix, _quantised(stored) if fp8 else stored, quantized=fp8)


def qwen3_next() -> Checkpoint:
    """Three linear-attention layers and a full one; the module begins with ``mtp.``."""
    model = _random_model(Qwen3NextConfig(**_QWEN, **_SHARED, rope_theta=100.0))
    c, generator = model.config, torch.Generator().manual_seed(2)
    size, head_dim = c.hidden_size, c.head_dim
    shapes: dict[str, tuple[int, ...]] = {"fc.weight": (size, 2 * size), "norm.weight": (size,)}
    shapes |= {f"pre_fc_norm_{name}.weight": (size,) for name in ("embedding", "hidden")}
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (size,),
        "post_attention_layernorm.weight": (size,),
        "self_attn.q_proj.weight": (c.num_attention_heads * head_dim * 2, size),
        "self_attn.k_proj.weight": (c.num_key_value_heads * head_dim, size),
        "self_attn.v_proj.weight": (c.num_key_value_heads * head_dim, size),
        "self_attn.o_proj.weight": (size, c.num_attention_heads * head_dim),
        "self_attn.q_norm.weight": (head_dim,),
        "self_attn.k_norm.weight": (head_dim,),
        "mlp.gate.weight": (c.num_experts, size),
        "mlp.shared_expert_gate.weight": (1, size),
    }
    experts = {f"mlp.experts.{i}": c.moe_intermediate_size for i in range(c.num_experts)}
    layer |= _mlp_shapes(size, {**experts, "mlp.shared_expert": c.shared_expert_intermediate_size})
    shapes |= {f"layers.0.{name}": shape for name, shape in layer.items()}
    stored = {f"mtp.{name}": _draw(name, shape, generator, norm_mean=0.0) for name, shape in shapes.items()}
    return Checkpoint(model, "mtp.", stored)


def load_native(draft: MTP, folder: str) -> None:
    """What ``draft.init_from=<the target's own folder>`` does."""
    pretrained = Pretrained.open(folder)
    fill(draft, pretrained.layout.tensors(pretrained.folder, draft), folder)


def target_of(checkpoint: Checkpoint) -> TransformersTarget:
    """The checkpoint's model as a target."""
    return TransformersTarget.from_model(
        checkpoint.model, byte_tokenizer(), name="tiny", aux_layer_ids=(0, 1), device="cpu"
    )


def spec_of(checkpoint: Checkpoint) -> TargetSpec:
    """What a draft is built from; by hand, since targets with linear attention are refused."""
    model, config = checkpoint.model, checkpoint.config
    dims = DecoderDims(
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        ffn_size=config.moe_intermediate_size,
        rms_norm_eps=config.rms_norm_eps,
        max_positions=config.max_position_embeddings,
        inv_freq=torch.ones(config.head_dim // 2),
        rope_attention_factor=1.0,
        rope_parameters={},
    )

    def new_layer(copied: bool) -> nn.Module:
        return StandaloneLayer(model.model, layer_type="full_attention", window=None, copied=copied)

    embedding, head = model.model.embed_tokens.weight.detach(), LinearHead(model.lm_head.weight.detach())
    return TargetSpec(dims, embedding, head, num_aux=0, model_type=config.model_type, new_layer=new_layer)


KINDS = {
    "deepseek": deepseek,
    "deepseek_without_q_lora": lambda: deepseek(q_lora=False),
    "deepseek_yarn_fp8": lambda: deepseek(yarn=True, fp8=True),
    "qwen3_next": qwen3_next,
}


@cache
def made(kind: str) -> tuple[Checkpoint, TargetSpec]:
    checkpoint = KINDS[kind]()
    return checkpoint, spec_of(checkpoint) if kind == "qwen3_next" else target_of(checkpoint).spec


def released(state: Tensors) -> Tensors:
    """Tensors of a transformers model in bfloat16 by their released names: experts one by one."""
    tensors = {}
    for name, tensor in state.items():
        fused = re.fullmatch(r"(.*mlp\.experts)\.(gate_up_proj|down_proj)", name)
        if fused is None:
            tensors[name] = tensor.bfloat16()
            continue
        for expert, weight in enumerate(tensor.bfloat16()):
            parts = weight.chunk(2) if fused[2] == "gate_up_proj" else (weight,)
            for part, values in zip(fused[2].removesuffix("_proj").split("_"), parts, strict=True):
                tensors[f"{fused[1]}.{expert}.{part}_proj.weight"] = values.clone()
    return tensors


def by_entry(weight: Tensor, scales: Tensor) -> Tensor:
    """An fp8 weight times the scale of each entry's own block, in float64."""
    rows, columns = (torch.arange(size) // BLOCK for size in weight.shape)
    return weight.double() * scales.double()[rows[:, None], columns]


def _mlp_shapes(size: int, widths: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for name, width in widths.items():
        shapes |= {f"{name}.{part}_proj.weight": (width, size) for part in ("gate", "up")}
        shapes[f"{name}.down_proj.weight"] = (size, width)
    return shapes


def _random_model(config: PreTrainedConfig) -> Any:
    """With weights that bfloat16 holds exactly, as a loaded checkpoint has them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                tensor.copy_(_draw(name, tuple(tensor.shape), generator))
    return model.eval()


def _draw(name: str, shape: tuple[int, ...], generator: torch.Generator, norm_mean: float = 1.0) -> Tensor:
    """Weights that keep variances, norms and biases far from their initial values."""
    values = torch.randn(shape, generator=generator)
    if len(shape) == 1:
        values = 0.3 * values + (norm_mean if "norm" in name else 0.0)
    elif "embed" not in name:
        values = values / math.sqrt(shape[-1])
    return values.bfloat16()


def _quantised(stored: Tensors) -> Tensors:
    """Projections in fp8 with a scale a block, as released; norms, router, eh_proj, embedding and head stay."""
    tensors = {}
    for name, tensor in stored.items():
        tensors[name] = tensor
        if tensor.ndim == 1 or name.endswith(("gate.weight", "eh_proj.weight", "tokens.weight", "head.weight")):
            continue
        rows, columns = (math.ceil(n / BLOCK) for n in tensor.shape)
        scales, codes = torch.zeros(rows, columns), torch.zeros(tensor.shape)
        for i in range(rows):
            for j in range(columns):
                block = slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK)
                scales[i, j] = tensor[block].float().abs().max() / 448 * (1 + i + 2 * j)  # blocks of unlike scales
                codes[block] = tensor[block].float() / scales[i, j]
        tensors[name], tensors[f"{name}_scale_inv"] = codes.to(torch.float8_e4m3fn), scales
    return tensors
