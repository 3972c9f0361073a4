"""The MLP speculator as fms-extras and TGI load it (``MLPSpeculatorPreTrainedModel``).

The format has no draft vocabulary, and every depth has an embedding of its own: where our draft reads the target's
table, the export holds ``embedding_scale`` times that table once a depth. Tied weights are written for every depth.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from lkspec.drafts.mlp import MLPSpeculator
from lkspec.export.base import Layout, WriteOptions, own_tensors
from lkspec.export.tensor_folder import TensorFolder
from lkspec.targets.base import Target

_PARTS = {"proj": ("weight",), "ln": ("weight", "bias"), "heads": ("weight",), "emb": ("weight",)}


class FmsMLP(Layout):
    """``speculator.{emb,proj,ln,head}.{i}``."""

    format = "mlp_speculator"
    draft_class = MLPSpeculator
    loaded_by = "fms-extras, TGI and vLLM 0.5 to 0.9; current vLLM and SGLang no longer serve it"
    aliases: ClassVar = {**Layout.aliases, "heads.": "head."}
    arguments: ClassVar = {
        "num_depths": "n_predict",
        "inner_dim": "inner_dim",
        "tie_weights": "tie_weights",
        "scale_input": "scale_input",
    }
    fixed: ClassVar = {"embeddings": "learned"}
    required = ("n_predict", "emb_dim")
    hidden_size = "emb_dim"

    def recognises(self, folder: TensorFolder) -> bool:
        return folder.config.get("model_type") == "mlp_speculator"

    def settings(self, folder: TensorFolder) -> dict[str, Any]:
        settings, config = super().settings(folder), folder.config
        settings["inner_dim"] = settings["inner_dim"] or config["emb_dim"]
        settings["tie_weights"] = config.get("tie_weights", config.get("tie_wts", False))
        return settings

    def tensors(self, folder: TensorFolder, draft: MLPSpeculator) -> dict[str, Tensor]:
        reader = self.reader(folder)
        tensors = {name: self.read(reader, name, draft) for name in own_tensors(draft)}
        for name, own in _each_depth(draft).items():
            copy, original = self.canonical(name), self.canonical(own)
            if (
                own != name
                and own in tensors
                and copy in reader.stored
                and not torch.equal(reader.get(copy), tensors[own])
            ):
                raise ValueError(
                    f"{folder.path}: config.json says tie_weights, but {copy} is not the same as {original}"
                )
        reader.finish(self.ignored)
        return tensors

    def stored(self, draft: MLPSpeculator, config: Any) -> dict[str, Tensor]:
        own = own_tensors(draft)
        if not draft.emb:  # every depth reads the target's table
            table = draft.target_embedding.float() * draft.embedding_scale
            own |= {name: table for name in _each_depth(draft).values() if name.startswith("emb.")}
        return {f"speculator.{self.canonical(name)}": own[ours] for name, ours in _each_depth(draft).items()}

    def config(self, draft: MLPSpeculator, target: Target, options: WriteOptions) -> dict[str, Any]:
        if not draft.vocab.is_full:
            raise ValueError(
                f"format=mlp_speculator holds heads of the whole vocabulary only ({draft.vocab.target_size:,} tokens); "
                f"this run's draft vocabulary has {draft.vocab.size:,}. Train with vocab.size=null to export it"
            )
        return {
            "architectures": ["MLPSpeculatorPreTrainedModel"],
            "model_type": "mlp_speculator",
            "vocab_size": draft.vocab.size,
            "emb_dim": target.spec.dims.hidden_size,
            "top_k_tokens_per_head": [1] * draft.num_depths,  # a chain, no tree
            "n_candidates": 1,
        }

    def facts(self, folder: TensorFolder, draft: MLPSpeculator, target: Target) -> list[str]:
        return [
            "states: the target's last hidden state, after its final norm; no auxiliary layers, positions or RoPE",
            f"weights: state and token are mixed for n_predict {draft.num_depths}, scale_input "
            f"{str(draft.scale_input).lower()}, norms without a mean, eps 1e-6",
            f"vocabulary: all {target.vocab_size:,} tokens of the target",
        ]


def _each_depth(draft: MLPSpeculator) -> dict[str, str]:
    """The name of each depth's tensor -> of the one that it is: tied weights are there once (projections twice)."""
    return {
        f"{part}.{depth}.{kind}": f"{part}.{min(depth, len(getattr(draft, part)) - 1)}.{kind}"
        for depth in range(draft.num_depths)
        for part, kinds in _PARTS.items()
        for kind in kinds
    }
