"""MTP modules in the native layouts of DeepSeek-V3 and Qwen3-Next: part of the target's own checkpoint.

An export is either the module alone beside the target's config (a sidecar) or a copy of the target with the module in
it, which is what engines serve. Both are read back by the same names.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from lkspec.drafts.base import Draft
from lkspec.drafts.mtp import MTP
from lkspec.export.base import (
    Layout,
    Reader,
    WriteOptions,
    as_saved,
    own_tensors,
    spelled,
    write_checkpoint,
    write_json,
)
from lkspec.export.serving import SAMPLES, ServeCommand, sglang_command, vllm_command
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
        aliases: how our names begin -> how theirs do, behind the prefix.
        shared: our name of the target's embedding and head -> of their own copies, if they have them.
        unit_offset: their norms outside the decoder layer multiply by 1 + weight.
    """

    prefix: str
    aliases: Mapping[str, str]
    shared: Mapping[str, str]
    unit_offset: bool


_FAMILIES = {
    "deepseek_v3": Names(
        prefix="model.layers.{L}.",
        aliases={"norm.": "shared_head.norm.", _OUR_LAYER: ""},
        shared={"embedding": "embed_tokens.weight", "head_weight": "shared_head.head.weight"},
        unit_offset=False,
    ),
    "qwen3_next": Names(
        prefix="mtp.",
        aliases={
            "enorm.": "pre_fc_norm_embedding.",
            "hnorm.": "pre_fc_norm_hidden.",
            "eh_proj.": "fc.",
            _OUR_LAYER: "layers.0.",
        },
        shared={},
        unit_offset=True,
    ),
}


class NativeMTP(Layout):
    """The module's tensors by the names that the target's family gives them."""

    format = "mtp"
    any_vocabulary = True
    draft_class = MTP
    loaded_by = "vLLM and SGLang, inside the target's own checkpoint (target_copy=true)"
    ignored = ("*_scale_inv",)
    fixed: ClassVar = {"layer_init": "random"}

    def recognises(self, folder: TensorFolder) -> bool:
        return folder.config.get("model_type") in _FAMILIES

    def reader(self, folder: TensorFolder) -> Reader:
        prefix = _prefix(folder.config)
        reader = Reader(folder, lambda name: name if name.startswith(prefix) else None)
        if not reader.stored:
            raise ValueError(f"{folder.path}: no tensor {prefix}*: this checkpoint was saved without MTP")
        return reader

    def theirs(self, name: str, draft: MTP, config: Mapping[str, Any]) -> str:
        return _prefix(config) + spelled(name, _family(config).aliases)

    def shared(self, draft: MTP, config: Mapping[str, Any]) -> dict[str, Tensor]:
        return {_prefix(config) + theirs: getattr(draft, ours) for ours, theirs in _family(config).shared.items()}

    def read(self, reader: Reader, name: str, draft: MTP) -> Tensor:
        theirs = self.theirs(name, draft, reader.folder.config)
        experts = _expert_names(theirs, len(draft.state_dict()[name]))
        if experts:
            return torch.stack([torch.cat([reader.get(part) for part in parts]) for parts in experts])
        return _moved(reader.get(theirs), name, reader.folder.config, 1.0)

    def stored(self, draft: MTP, config: Mapping[str, Any]) -> dict[str, Tensor]:
        tensors = self.shared(draft, config)
        for name, tensor in own_tensors(draft).items():
            theirs = self.theirs(name, draft, config)
            experts = _expert_names(theirs, len(tensor))
            for parts, weights in zip(experts, tensor, strict=False):
                tensors |= zip(parts, weights.chunk(len(parts)), strict=True)
            if not experts:
                tensors[theirs] = _moved(tensor, name, config, -1.0)
        return tensors

    def config(self, draft: MTP, target: Target, options: WriteOptions) -> dict[str, Any]:
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
        return {**target.model_config, "num_nextn_predict_layers": 1}

    def write(self, folder: Path, draft: Draft, target: Target, options: WriteOptions) -> None:
        assert isinstance(draft, MTP)
        config = self.config(draft, target, options)
        tensors = self.stored(draft, config)
        if options.target_copy:
            if target.source is None:
                raise ValueError("target_copy=true needs a target that was loaded from a folder or the hub")
            _stitch(TensorFolder(target.source), folder, tensors, config, options.dtype)
            return
        config.pop("quantization_config", None)  # the module alone is not quantised, whatever the target is
        write_checkpoint(folder, tensors, config, options.dtype)

    def check_target(self, folder: TensorFolder, target: Target) -> None:
        layers = folder.config["num_hidden_layers"]
        if layers != target.num_layers:
            raise ValueError(f"{folder.path}: config.json says {layers} layers, the target has {target.num_layers}")

    def facts(self, folder: TensorFolder, draft: MTP, target: Target) -> list[str]:
        num_tensors = len(self.reader(folder).stored)
        return [
            "states: the target's last hidden state, after its final norm; no auxiliary layers",
            f"module: {num_tensors} tensors {_prefix(folder.config)}*, beside the target's {target.num_layers} layers",
            "RoPE, norms and positions: the target's own layer class and config",
            f"vocabulary: all {target.vocab_size:,} tokens, with the target's embedding and head",
        ]

    def serve_commands(self, draft: MTP, target_path: str, path: str, options: WriteOptions) -> list[ServeCommand]:
        if not options.target_copy:  # nothing serves the module alone
            return []
        return [
            vllm_command({"method": "mtp", **SAMPLES}, path, options.num_draft_tokens, draft=None),
            sglang_command("NEXTN", path, options.num_draft_tokens, draft=None),
        ]


def _family(config: Mapping[str, Any]) -> Names:
    return _FAMILIES[config["model_type"]]


def _prefix(config: Mapping[str, Any]) -> str:
    return _family(config).prefix.replace("{L}", str(config.get("num_hidden_layers")))


def _moved(tensor: Tensor, name: str, config: Mapping[str, Any], by: float) -> Tensor:
    """A norm that the family stores as weight - 1, there or back."""
    is_offset = _family(config).unit_offset and tensor.ndim == 1 and not name.startswith(_OUR_LAYER)
    return tensor.float() + by if is_offset else tensor


def _expert_names(name: str, num_experts: int) -> list[list[str]]:
    """The parts of each expert, which released checkpoints keep one by one; none of any other tensor."""
    experts = _EXPERTS.fullmatch(name)
    if experts is None:
        return []
    parts = ("gate_proj", "up_proj") if experts["which"] == "gate_up_proj" else ("down_proj",)
    return [[f"{experts['before']}{expert}.{part}.weight" for part in parts] for expert in range(num_experts)]


def _stitch(
    source: TensorFolder, folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], dtype: torch.dtype
) -> None:
    """A copy of the target's folder in which the module's tensors are ours.

    Engines read every tensor of every shard, whatever the index says: shards that hold the old module are written again
    without it.
    """
    module, prefix = _as_released(source, tensors, dtype), _prefix(config)
    weight_map = {name: shard for name, shard in source.files.items() if not name.startswith(prefix)}
    stale = {shard for name, shard in source.files.items() if name.startswith(prefix)}
    for shard in sorted(set(source.files.values())):
        if shard not in stale:
            shutil.copyfile(source.fetched(shard), folder / shard)
        elif kept := [name for name, where in weight_map.items() if where == shard]:
            save_file({name: source.raw(name) for name in kept}, folder / shard, metadata={"format": "pt"})
    save_file(module, folder / _MODULE_FILE, metadata={"format": "pt"})
    weight_map |= dict.fromkeys(module, _MODULE_FILE)
    total = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
    write_json(folder / "config.json", {**source.config, "num_nextn_predict_layers": 1})
    # Tokenizer, generation config, code: what a model needs beside its weights and config.
    known = {*source.files.values(), INDEX, "config.json", "README.md"}
    for file in source.local.iterdir():
        if file.is_file() and file.name not in known:
            shutil.copyfile(file, folder / file.name)


def _as_released(source: TensorFolder, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The module's tensors in the precision of the target's checkpoint: fp8 where its own module is."""
    saved = as_saved(tensors, dtype)
    quantization = source.config.get("quantization_config")
    if quantization is None:
        return saved
    coded = [name for name in tensors if f"{name}_scale_inv" in source.files]
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
