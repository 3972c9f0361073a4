"""MTP modules in the native layouts of DeepSeek-V3 and Qwen3-Next: part of the target's own checkpoint.

An export is either the module alone beside the target's config (a sidecar) or a copy of the target with the module in
it, which is what engines serve. Both are read back by the same names.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lkspec.drafts.base import Draft
from lkspec.drafts.mtp import MTP
from lkspec.export.base import Layout, ServeCommand, WriteOptions, same_as_target, write_checkpoint
from lkspec.export.tensor_folder import DEFAULT_BLOCK, INDEX, TensorFolder, quantised
from lkspec.targets.base import Target

_MODULE_FILE = "model-mtp.safetensors"
_OUR_LAYER = "layer.layer."
_EXPERTS = re.compile(r"(?P<before>.*mlp\.experts\.)(?P<which>gate_up_proj|down_proj)")


@dataclass(frozen=True)
class Names:
    """One family's conventions.

    Attributes:
        prefix: begins all names of the module; ``{L}`` is the target's number of layers.
        names: our name of a tensor beside the decoder layer -> theirs, behind the prefix.
        layer_prefix: begins theirs inside the decoder layer.
        shared: their own copies of the target's embedding and head, if they have them.
        unit_offset: their norms of ``names`` multiply by 1 + weight.
    """

    prefix: str
    names: Mapping[str, str]
    layer_prefix: str
    shared: Mapping[str, str]
    unit_offset: bool


_FAMILIES = {
    "deepseek_v3": Names(
        prefix="model.layers.{L}.",
        names={
            "enorm.weight": "enorm.weight",
            "hnorm.weight": "hnorm.weight",
            "eh_proj.weight": "eh_proj.weight",
            "norm.weight": "shared_head.norm.weight",
        },
        layer_prefix="",
        shared={"embedding": "embed_tokens.weight", "head": "shared_head.head.weight"},
        unit_offset=False,
    ),
    "qwen3_next": Names(
        prefix="mtp.",
        names={
            "enorm.weight": "pre_fc_norm_embedding.weight",
            "hnorm.weight": "pre_fc_norm_hidden.weight",
            "eh_proj.weight": "fc.weight",
            "norm.weight": "norm.weight",
        },
        layer_prefix="layers.0.",
        shared={},
        unit_offset=True,
    ),
}


class NativeMTP(Layout):
    """The module's tensors by the names that the target's family gives them."""

    format = "mtp"
    any_vocabulary = True
    draft_class = MTP
    served_by = "vLLM and SGLang, inside the target's own checkpoint (target_copy=true)"

    def recognises(self, folder: TensorFolder) -> bool:
        return folder.config.get("model_type") in _FAMILIES

    def settings(self, folder: TensorFolder) -> dict[str, Any]:
        return {"layer_init": "random"}  # overwritten

    def tensors(self, folder: TensorFolder, draft: Draft) -> dict[str, Tensor]:
        assert isinstance(draft, MTP)
        family = _FAMILIES[folder.config["model_type"]]
        prefix = _prefix(family, folder.config)
        if not folder.names(prefix):
            raise ValueError(f"{folder.path}: no tensor {prefix}*: this checkpoint was saved without MTP")
        read: set[str] = set()
        tensors = {}
        for name, tensor in draft.state_dict().items():
            if name != "vocab.ids":
                tensors[name] = _read(folder, family, prefix, name, tensor.shape, read)
        self._check_shared(folder, family, prefix, draft, read)
        read |= {f"{name}_scale_inv" for name in read}
        unread = [name for name in folder.names(prefix) if name not in read]
        if unread:
            raise ValueError(f"{folder.path}: no place for {', '.join(unread[:5])} ({len(unread)} in all)")
        return tensors

    def _check_shared(self, folder: TensorFolder, family: Names, prefix: str, draft: MTP, read: set[str]) -> None:
        """The checkpoint's copies of the target's embedding and head."""
        for which, theirs in family.shared.items():
            if prefix + theirs not in folder:
                continue
            copy, ours = folder.get(prefix + theirs), draft.embedding if which == "embedding" else draft.head_weight
            if which == "head" and copy.shape[0] == draft.vocab.target_size:
                copy = copy[draft.vocab.ids.to(copy.device)]
            same_as_target(folder, prefix + theirs, copy, ours)
            read.add(prefix + theirs)

    def write(self, folder: Path, draft: Draft, target: Target, options: WriteOptions) -> None:
        assert isinstance(draft, MTP)
        if target.spec.model_type not in _FAMILIES:
            raise ValueError(
                f"format=mtp: targets of type {target.spec.model_type} have no MTP module of their own, and no engine "
                f"serves one for them; {' and '.join(sorted(_FAMILIES))} have"
            )
        if not draft.vocab.is_full:
            raise ValueError(
                f"format=mtp: a native module proposes all {draft.vocab.target_size:,} tokens, this run's draft "
                f"vocabulary has {draft.vocab.size:,}; train with vocab.size=null to export it"
            )
        config = {**target.model_config, "num_nextn_predict_layers": 1}
        family = _FAMILIES[target.spec.model_type]
        tensors = _stored(draft, family, _prefix(family, config))
        if not options.target_copy:
            # What the module alone holds is not quantised, whatever the target is.
            write_checkpoint(folder, tensors, _without(config, "quantization_config"), options.dtype)
            return
        if target.source is None:
            raise ValueError("target_copy=true needs a target that was loaded from a folder or the hub")
        _stitch(TensorFolder(target.source), folder, tensors, config, options.dtype)

    def check_target(self, folder: TensorFolder, target: Target) -> None:
        """The checkpoint is the target's own; its copies of embedding and head are compared."""

    def checks(self, folder: TensorFolder, draft: Draft, target: Target) -> list[str]:
        assert isinstance(draft, MTP)
        layers = folder.config["num_hidden_layers"]
        if layers != target.num_layers:
            raise ValueError(f"{folder.path}: config.json says {layers} layers, the target has {target.num_layers}")
        where = _prefix(_FAMILIES[folder.config["model_type"]], folder.config)
        return [
            "states: the target's last hidden state, after its final norm; no auxiliary layers",
            f"module: {len(folder.names(where))} tensors {where}*, beside the target's {layers} layers",
            "RoPE, norms and positions: the target's own layer class and config",
            f"vocabulary: all {target.vocab_size:,} tokens, with the target's embedding and head",
        ]

    def serve_commands(self, draft: Draft, target_path: str, path: str, options: WriteOptions) -> list[ServeCommand]:
        if not options.target_copy:  # nothing serves the module alone
            return []
        num_draft_tokens = options.num_draft_tokens
        spec = {
            "method": "mtp",
            "num_speculative_tokens": num_draft_tokens,
            "draft_sample_method": "probabilistic",
        }
        return [
            ServeCommand(
                "vLLM",
                f"vllm serve {path} --speculative-config '{json.dumps(spec)}'",
                '"draft_sample_method": "probabilistic" (its name differs in older versions)',
            ),
            ServeCommand(
                "SGLang",
                f"python -m sglang.launch_server --model-path {path} --speculative-algorithm NEXTN "
                f"--speculative-num-steps {num_draft_tokens} --speculative-eagle-topk 1 "
                f"--speculative-num-draft-tokens {num_draft_tokens + 1} --speculative-use-rejection-sampling",
                "--speculative-use-rejection-sampling (with --speculative-eagle-topk 1)",
            ),
        ]


def _prefix(family: Names, config: Mapping[str, Any]) -> str:
    return family.prefix.replace("{L}", str(config.get("num_hidden_layers")))


def _without(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name != key}


def _read(folder: TensorFolder, family: Names, prefix: str, name: str, shape: torch.Size, read: set[str]) -> Tensor:
    def get(theirs: str) -> Tensor:
        read.add(theirs)
        return folder.get(theirs)

    if name in family.names:
        tensor = get(prefix + family.names[name])
        return tensor.float() + 1.0 if family.unit_offset and tensor.ndim == 1 else tensor
    theirs = prefix + family.layer_prefix + name.removeprefix(_OUR_LAYER)
    experts = _EXPERTS.fullmatch(theirs)
    if experts is None:
        return get(theirs)
    # transformers keeps all experts in one tensor, released checkpoints one by one.
    stacked = []
    for expert in range(shape[0]):
        parts = _expert_parts(experts["which"])
        stacked.append(torch.cat([get(f"{experts['before']}{expert}.{part}.weight") for part in parts]))
    return torch.stack(stacked)


def _stored(draft: MTP, family: Names, prefix: str) -> dict[str, Tensor]:
    """The inverse of reading."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in draft.state_dict().items():
        if name == "vocab.ids":
            continue
        if name in family.names:
            own = tensor.float() - 1.0 if family.unit_offset and tensor.ndim == 1 else tensor
            tensors[prefix + family.names[name]] = own
            continue
        theirs = prefix + family.layer_prefix + name.removeprefix(_OUR_LAYER)
        experts = _EXPERTS.fullmatch(theirs)
        if experts is None:
            tensors[theirs] = tensor
            continue
        parts = _expert_parts(experts["which"])
        for expert, weights in enumerate(tensor):
            for part, weight in zip(parts, weights.chunk(len(parts)), strict=True):
                tensors[f"{experts['before']}{expert}.{part}.weight"] = weight
    shared = {"embedding": draft.embedding, "head": draft.head_weight}
    return tensors | {prefix + theirs: shared[which] for which, theirs in family.shared.items()}


def _expert_parts(which: str) -> tuple[str, ...]:
    return ("gate_proj", "up_proj") if which == "gate_up_proj" else ("down_proj",)


def _stitch(
    source: TensorFolder, folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], dtype: torch.dtype
) -> None:
    """A copy of the target's folder in which the module's tensors are ours.

    Engines read every tensor of every shard, whatever the index says: shards that hold the old module are written again
    without it.
    """
    module = _as_released(source, tensors, config, dtype)
    family = _FAMILIES[config["model_type"]]
    prefix = _prefix(family, config)
    weight_map = {name: shard for name, shard in source.files.items() if not name.startswith(prefix)}
    stale = {shard for name, shard in source.files.items() if name.startswith(prefix)}
    for shard in sorted(set(source.files.values())):
        if shard not in stale:
            shutil.copyfile(source.fetched(shard), folder / shard)
        elif kept := [name for name, where in weight_map.items() if where == shard]:
            with safe_open(source.fetched(shard), framework="pt") as opened:
                save_file({name: opened.get_tensor(name) for name in kept}, folder / shard, metadata={"format": "pt"})
    save_file(module, folder / _MODULE_FILE, metadata={"format": "pt"})
    weight_map |= dict.fromkeys(module, _MODULE_FILE)
    total = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for file in _other_files(source.local, {*source.files.values(), INDEX, "config.json", "README.md"}):
        shutil.copyfile(file, folder / file.name)
    original = {**source.config, "num_nextn_predict_layers": config["num_nextn_predict_layers"]}
    (folder / "config.json").write_text(json.dumps(original, indent=2) + "\n", encoding="utf-8")


def _other_files(folder: Path, known: Iterable[str]) -> list[Path]:
    """Tokenizer, generation config, code: what a model needs beside its weights and config."""
    names = set(known)
    return sorted(file for file in folder.iterdir() if file.is_file() and file.name not in names)


def _as_released(
    source: TensorFolder, tensors: Mapping[str, Tensor], config: Mapping[str, Any], dtype: torch.dtype
) -> dict[str, Tensor]:
    """The module's tensors in the precision of the target's checkpoint: fp8 where its own module is."""
    saved = {name: tensor.detach().cpu().to(dtype).contiguous().clone() for name, tensor in tensors.items()}
    quantization = source.config.get("quantization_config")
    if quantization is None:
        return saved
    coded = [name for name in tensors if f"{name}_scale_inv" in source]
    if quantization.get("quant_method") != "fp8" or not coded:
        raise ValueError(
            f"{source.path}: target_copy=true into a checkpoint with quantization_config "
            f"{quantization.get('quant_method')!r} needs block-wise fp8 and a module in it already, which says what is "
            "quantised; export the module alone (target_copy=false)"
        )
    block = tuple(quantization.get("weight_block_size", DEFAULT_BLOCK))
    for name in coded:
        saved[name], saved[f"{name}_scale_inv"] = quantised(tensors[name].detach().cpu(), block)
    return saved
