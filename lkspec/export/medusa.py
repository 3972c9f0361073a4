"""MEDUSA as vLLM loads it, and as the original repository released it (read only)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lkspec.drafts.medusa import Medusa
from lkspec.export.base import Layout, Reader, WriteOptions
from lkspec.export.tensor_folder import TensorFolder
from lkspec.targets.base import Target
from lkspec.vocab import DraftVocab


class VllmMedusa(Layout):
    """``blocks.{h}.layers.{l}``, ``lm_heads.{h}`` and, of a truncated vocabulary, ``token_map``.

    vLLM 0.32 gives every separate head the whole vocabulary of the target, and refuses a truncated one. Heads are
    therefore written whole: a row outside the draft vocabulary repeats the row of its first token, so that its logit
    never exceeds that token's and an argmax, the only way in which vLLM's Medusa drafts, does not choose it.
    ``trained_vocab_size`` and ``token_map`` lead back to the rows that were trained; vLLM reads neither.
    """

    format: ClassVar[str | None] = "medusa"
    draft_class = Medusa
    loaded_by = "vLLM 0.5 to 0.32, which draft by argmax (removed in 0.33); not SGLang"
    vllm: ClassVar = {"method": "medusa"}
    aliases: ClassVar = {**Layout.aliases, "medusa_heads.": ""}
    ignored = ("token_map",)
    arguments: ClassVar = {"num_depths": "num_heads", "num_layers": "num_hidden_layers", "bias": "medusa_fc_bias"}
    fixed: ClassVar = {"head_init": "random"}
    required = ("num_heads", "num_hidden_layers")
    only: ClassVar = {"logit_scale": 1.0}

    def recognises(self, folder: TensorFolder) -> bool:
        return folder.config.get("model_type") == "medusa"

    def row_ids(self, folder: TensorFolder, target_size: int) -> Int[Tensor, " D"]:
        size = folder.config.get("trained_vocab_size") or folder.config.get("truncated_vocab_size") or target_size
        if size == target_size:
            return torch.arange(target_size)
        return self.reader(folder).get("token_map").to(torch.int64)

    def read(self, reader: Reader, name: str, draft: Medusa) -> Tensor:
        if name.startswith("lm_heads.") and reader.folder.config.get("original_lm_head", False):  # one for all depths
            return reader.get("lm_head.weight" if "lm_head.weight" in reader.stored else "lm_heads.0.weight")
        return super().read(reader, name, draft)

    def stored(self, draft: Medusa, config: Mapping[str, Any]) -> dict[str, Tensor]:
        tensors = super().stored(draft, config)
        if draft.vocab.is_full:
            return tensors
        whole = {name: _whole(tensor, draft.vocab) for name, tensor in tensors.items() if name.startswith("lm_heads.")}
        return {**tensors, **whole, "token_map": draft.vocab.ids}

    def config(self, draft: Medusa, target: Target, options: WriteOptions) -> dict[str, Any]:
        return {
            "architectures": ["MedusaModel"],
            "model_type": "medusa",
            "hidden_size": target.spec.dims.hidden_size,
            "vocab_size": draft.vocab.target_size,
            "truncated_vocab_size": draft.vocab.target_size,
            **({} if draft.vocab.is_full else {"trained_vocab_size": draft.vocab.size}),
            "original_lm_head": False,
            "logit_scale": 1.0,
            "max_position_embeddings": target.max_positions,
        }

    def facts(self, folder: TensorFolder, draft: Medusa, target: Target) -> list[str]:
        return [
            "states: the target's last hidden state, after its final norm; no auxiliary layers, positions or RoPE",
            f"heads: {draft.num_depths}, {draft.num_layers} residual blocks each",
            f"vocabulary: {draft.vocab.size:,} of the target's {target.vocab_size:,} tokens, by "
            + ("their own ids" if draft.vocab.is_full else "token_map; the other rows of the heads repeat the first's"),
        ]


class OriginalMedusa(VllmMedusa):
    """``{h}.{l}.linear.{weight,bias}`` and ``{h}.{L}.weight``, L blocks a head; read only."""

    format = None
    aliases: ClassVar = {**Layout.aliases, "medusa_head.": ""}

    def recognises(self, folder: TensorFolder) -> bool:
        return "medusa_num_heads" in folder.config

    def settings(self, folder: TensorFolder) -> dict[str, Any]:
        names = self.reader(folder).stored
        # The released configs name fewer heads than there are.
        heads = {match[1] for name in names if (match := re.match(r"(\d+)\.", name))}
        layers = {match[1] for name in names if (match := re.fullmatch(r"0\.(\d+)\.linear\.weight", name))}
        own = {"num_depths": len(heads), "num_layers": len(layers), "bias": "0.0.linear.bias" in names}
        return {**own, **self.fixed}

    def theirs(self, name: str, draft: Medusa, config: Mapping[str, Any]) -> str:
        name = re.sub(r"^blocks\.(\d+)\.layers\.(\d+)", r"\1.\2.linear", name)
        return re.sub(r"^lm_heads\.(\d+)", rf"\1.{draft.num_layers}", name)


def _whole(rows: Float[Tensor, "D H"], vocab: DraftVocab) -> Float[Tensor, "V H"]:
    """A head over the target's vocabulary."""
    whole = rows[:1].repeat(vocab.target_size, 1)
    whole[vocab.ids] = rows
    return whole
