"""MEDUSA as vLLM loads it, and as the original repository released it (read only)."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lkspec.drafts.base import Draft
from lkspec.drafts.medusa import Medusa
from lkspec.export.base import (
    Layout,
    Reader,
    ServeCommand,
    WriteOptions,
    dtype_name,
    refuse_other_values,
    sorted_ids,
    whole_config,
    write_checkpoint,
)
from lkspec.export.tensor_folder import TensorFolder
from lkspec.targets.base import Target
from lkspec.vocab import DraftVocab

_VLLM_PREFIX = "medusa_heads."
_ORIGINAL_PREFIX = "medusa_head."


class VllmMedusa(Layout):
    """``blocks.{h}.layers.{l}``, ``lm_heads.{h}`` and, of a truncated vocabulary, ``token_map``.

    vLLM 0.32 gives every separate head the whole vocabulary of the target, and refuses a truncated one. Heads are
    therefore written whole: a row outside the draft vocabulary repeats the row of its first token, so that its logit
    never exceeds that token's and an argmax, the only way in which vLLM's Medusa drafts, does not choose it.
    ``trained_vocab_size`` and ``token_map`` lead back to the rows that were trained; vLLM reads neither.
    """

    format: ClassVar[str | None] = "medusa"
    draft_class = Medusa
    served_by = "vLLM 0.5 to 0.32, which draft by argmax (removed in 0.33); not SGLang"

    def recognises(self, folder: TensorFolder) -> bool:
        return folder.config.get("model_type") == "medusa"

    def settings(self, folder: TensorFolder) -> dict[str, Any]:
        config = folder.config
        whole_config(folder, config, ("num_heads", "num_hidden_layers"))
        refuse_other_values(folder, config, {"logit_scale": 1.0})
        return {
            "num_depths": config["num_heads"],
            "num_layers": config["num_hidden_layers"],
            "bias": bool(config.get("medusa_fc_bias", False)),
            "head_init": "random",  # overwritten
        }

    def check_target(self, folder: TensorFolder, target: Target) -> None:
        check_sizes(folder, target)

    def vocab_ids(self, folder: TensorFolder, target_size: int) -> Int[Tensor, " D"]:
        return sorted_ids(_token_map(folder, target_size))[0]

    def tensors(self, folder: TensorFolder, draft: Draft) -> dict[str, Tensor]:
        reader = Reader(folder, _bare)
        ids = _token_map(folder, draft.vocab.target_size)
        order = sorted_ids(ids)[1]
        reader.skip("token_map")
        one_head = bool(folder.config.get("original_lm_head", False))
        tensors = {}
        for name in draft.state_dict():
            if name.startswith("lm_heads."):
                theirs = _only_head(reader) if one_head else name
                rows = reader.get(theirs)
                # Heads may have kept the rows that the map leaves out.
                tensors[name] = (rows[ids] if len(rows) > len(ids) else rows)[order]
            elif name != "vocab.ids":
                tensors[name] = reader.get(name)
        reader.finish()
        return tensors

    def write(self, folder: Path, draft: Draft, target: Target, options: WriteOptions) -> None:
        assert isinstance(draft, Medusa)
        tensors = {name: tensor for name, tensor in draft.state_dict().items() if name != "vocab.ids"}
        truncated: dict[str, Any] = {}
        if not draft.vocab.is_full:
            tensors = {n: _whole(t, draft.vocab) if n.startswith("lm_heads.") else t for n, t in tensors.items()}
            tensors["token_map"] = draft.vocab.ids
            truncated = {"trained_vocab_size": draft.vocab.size}
        config = {
            "architectures": ["MedusaModel"],
            "model_type": "medusa",
            "hidden_size": target.spec.dims.hidden_size,
            "vocab_size": draft.vocab.target_size,
            "truncated_vocab_size": draft.vocab.target_size,
            **truncated,
            "num_heads": draft.num_depths,
            "num_hidden_layers": _num_layers(draft),
            "medusa_fc_bias": "blocks.0.layers.0.bias" in tensors,
            "original_lm_head": False,
            "logit_scale": 1.0,
            "max_position_embeddings": target.max_positions,
            "torch_dtype": dtype_name(options.dtype),
        }
        write_checkpoint(folder, tensors, config, options.dtype)

    def checks(self, folder: TensorFolder, draft: Draft, target: Target) -> list[str]:
        assert isinstance(draft, Medusa)
        self.check_target(folder, target)
        settings = self.settings(folder)
        if (settings["num_depths"], settings["num_layers"]) != (draft.num_depths, _num_layers(draft)):
            raise ValueError(f"{folder.path}: config.json does not describe the draft's heads")
        ids = _token_map(folder, target.vocab_size)
        if not torch.equal(ids, draft.vocab.ids.cpu()):
            raise ValueError(f"{folder.path}: token_map does not lead to the draft's vocabulary")
        return [
            "states: the target's last hidden state, after its final norm; no auxiliary layers, positions or RoPE",
            f"heads: {draft.num_depths}, {_num_layers(draft)} residual blocks each",
            f"vocabulary: {draft.vocab.size:,} of the target's {target.vocab_size:,} tokens, by "
            + ("their own ids" if draft.vocab.is_full else "token_map; the other rows of the heads repeat the first's"),
        ]

    def serve_commands(self, draft: Draft, target_path: str, path: str, options: WriteOptions) -> list[ServeCommand]:
        spec = {"method": "medusa", "model": path, "num_speculative_tokens": options.num_draft_tokens}
        command = f"vllm serve {target_path} --speculative-config '{json.dumps(spec)}'"
        return [ServeCommand("vLLM 0.5 to 0.32", command, "none: vLLM's Medusa drafts by argmax at every temperature")]


class OriginalMedusa(VllmMedusa):
    """``{h}.{l}.linear.{weight,bias}`` and ``{h}.{L}.weight``, L blocks a head; read only."""

    format = None

    def recognises(self, folder: TensorFolder) -> bool:
        return "medusa_num_heads" in folder.config

    def settings(self, folder: TensorFolder) -> dict[str, Any]:
        names = Reader(folder, _bare_original).names
        # The released configs name fewer heads than there are.
        heads = {int(match[1]) for name in names if (match := re.match(r"(\d+)\.", name))}
        layers = {int(match[1]) for name in names if (match := re.fullmatch(r"0\.(\d+)\.linear\.weight", name))}
        return {
            "num_depths": len(heads),
            "num_layers": len(layers),
            "bias": "0.0.linear.bias" in names,
            "head_init": "random",  # overwritten
        }

    def check_target(self, folder: TensorFolder, target: Target) -> None:
        """Its config says nothing of the target; shapes do."""

    def vocab_ids(self, folder: TensorFolder, target_size: int) -> Int[Tensor, " D"]:
        return torch.arange(target_size)

    def tensors(self, folder: TensorFolder, draft: Draft) -> dict[str, Tensor]:
        assert isinstance(draft, Medusa)
        reader = Reader(folder, _bare_original)
        tensors = {}
        for name in draft.state_dict():
            if match := re.fullmatch(r"blocks\.(\d+)\.layers\.(\d+)\.(weight|bias)", name):
                tensors[name] = reader.get(f"{match[1]}.{match[2]}.linear.{match[3]}")
            elif match := re.fullmatch(r"lm_heads\.(\d+)\.weight", name):
                tensors[name] = reader.get(f"{match[1]}.{_num_layers(draft)}.weight")
        reader.finish()
        return tensors

    def write(self, folder: Path, draft: Draft, target: Target, options: WriteOptions) -> None:
        raise ValueError("the original Medusa layout is read only; format=medusa writes what vLLM loads")


def check_sizes(folder: TensorFolder, target: Target) -> None:
    """Compares ``hidden_size`` and ``vocab_size`` with the target's.

    Raises:
        ValueError: the checkpoint was made for another target.
    """
    config = folder.config
    for key, ours in (("hidden_size", target.spec.dims.hidden_size), ("vocab_size", target.vocab_size)):
        if config.get(key, ours) != ours:
            raise ValueError(f"{folder.path}: made for a target with {key} {config[key]}, {target.name} has {ours}")


def _token_map(folder: TensorFolder, target_size: int) -> Int[Tensor, " D"]:
    """Target id of each row of the heads, in the checkpoint's own order."""
    reader = Reader(folder, _bare)
    size = folder.config.get("trained_vocab_size") or folder.config.get("truncated_vocab_size") or target_size
    if size == target_size:
        return torch.arange(target_size)
    return reader.get("token_map").to(torch.int64)


def _whole(rows: Float[Tensor, "D H"], vocab: DraftVocab) -> Float[Tensor, "V H"]:
    """A head over the target's vocabulary."""
    whole = rows[:1].repeat(vocab.target_size, 1)
    whole[vocab.ids] = rows
    return whole


def _only_head(reader: Reader) -> str:
    return "lm_head.weight" if "lm_head.weight" in reader else "lm_heads.0.weight"


def _num_layers(draft: Medusa) -> int:
    return sum(name.startswith("blocks.0.") and name.endswith("weight") for name in draft.state_dict())


def _bare(name: str) -> str:
    return name.removeprefix(_VLLM_PREFIX)


def _bare_original(name: str) -> str:
    return name.removeprefix(_ORIGINAL_PREFIX)
