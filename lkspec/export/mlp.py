"""The MLP speculator as fms-extras and TGI load it (``MLPSpeculatorPreTrainedModel``).

The format has no draft vocabulary, and every depth has an embedding of its own: where our draft reads the target's
table, the export holds ``embedding_scale`` times that table once a depth. Tied weights are written for every depth.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lkspec.drafts.base import Draft
from lkspec.drafts.mlp import MLPSpeculator
from lkspec.export.base import Layout, Reader, ServeCommand, WriteOptions, dtype_name, whole_config, write_checkpoint
from lkspec.export.tensor_folder import TensorFolder
from lkspec.targets.base import Target

_PREFIX = "speculator."
_PARTS = {"proj": ("weight",), "ln": ("weight", "bias"), "heads": ("weight",), "emb": ("weight",)}
_THEIRS = {"heads": "head"}


class FmsMLP(Layout):
    """``speculator.{emb,proj,ln,head}.{i}``."""

    format = "mlp_speculator"
    draft_class = MLPSpeculator
    served_by = "fms-extras, TGI and vLLM 0.5 to 0.9; current vLLM and SGLang no longer serve it"

    def recognises(self, folder: TensorFolder) -> bool:
        return folder.config.get("model_type") == "mlp_speculator"

    def settings(self, folder: TensorFolder) -> dict[str, Any]:
        config = folder.config
        whole_config(folder, config, ("n_predict", "emb_dim"))
        return {
            "num_depths": config["n_predict"],
            "inner_dim": config.get("inner_dim") or config["emb_dim"],
            "embeddings": "learned",
            "tie_weights": bool(config.get("tie_weights", config.get("tie_wts", False))),
            "scale_input": bool(config.get("scale_input", False)),
        }

    def check_target(self, folder: TensorFolder, target: Target) -> None:
        config = folder.config
        for key, ours in (("emb_dim", target.spec.dims.hidden_size), ("vocab_size", target.vocab_size)):
            if config.get(key, ours) != ours:
                raise ValueError(f"{folder.path}: made for a target with {key} {config[key]}, {target.name} has {ours}")

    def tensors(self, folder: TensorFolder, draft: Draft) -> dict[str, Tensor]:
        assert isinstance(draft, MLPSpeculator)
        reader = Reader(folder)
        tensors = {name: reader.get(_theirs(name)) for name in draft.state_dict() if name != "vocab.ids"}
        for depth in range(draft.num_depths):
            for part, kinds in _PARTS.items():
                for kind in kinds:
                    _check_tied(folder, reader, draft, tensors, f"{part}.{depth}.{kind}")
        reader.finish()
        return tensors

    def write(self, folder: Path, draft: Draft, target: Target, options: WriteOptions) -> None:
        assert isinstance(draft, MLPSpeculator)
        if not draft.vocab.is_full:
            raise ValueError(
                f"format=mlp_speculator holds heads of the whole vocabulary only ({draft.vocab.target_size:,} tokens); "
                f"this run's draft vocabulary has {draft.vocab.size:,}. Train with vocab.size=null to export it"
            )
        tensors = {}
        for depth in range(draft.num_depths):
            for part, kinds in _PARTS.items():
                for kind in kinds:
                    name = f"{part}.{depth}.{kind}"
                    tensors[_PREFIX + _theirs(name)] = _of_depth(draft, name)
        config = {
            "architectures": ["MLPSpeculatorPreTrainedModel"],
            "model_type": "mlp_speculator",
            "vocab_size": draft.vocab.size,
            "emb_dim": target.spec.dims.hidden_size,
            "inner_dim": draft.head(1).weight.shape[1],
            "n_predict": draft.num_depths,
            "top_k_tokens_per_head": [1] * draft.num_depths,  # a chain, no tree
            "n_candidates": 1,
            "tie_weights": draft.tie_weights,
            "scale_input": draft.scale_input,
            "torch_dtype": dtype_name(options.dtype),
        }
        write_checkpoint(folder, tensors, config, options.dtype)

    def checks(self, folder: TensorFolder, draft: Draft, target: Target) -> list[str]:
        assert isinstance(draft, MLPSpeculator)
        self.check_target(folder, target)
        settings = self.settings(folder)
        ours = {"num_depths": draft.num_depths, "tie_weights": draft.tie_weights, "scale_input": draft.scale_input}
        if any(settings[key] != value for key, value in ours.items()):
            raise ValueError(f"{folder.path}: config.json does not describe the draft")
        return [
            "states: the target's last hidden state, after its final norm; no auxiliary layers, positions or RoPE",
            f"weights: state and token are mixed for n_predict {draft.num_depths}, scale_input "
            f"{str(draft.scale_input).lower()}, norms without a mean, eps 1e-6",
            f"vocabulary: all {target.vocab_size:,} tokens of the target",
        ]

    def serve_commands(self, draft: Draft, target_path: str, path: str, options: WriteOptions) -> list[ServeCommand]:
        return []


def _theirs(name: str) -> str:
    part, _, rest = name.partition(".")
    return f"{_THEIRS.get(part, part)}.{rest}"


def _own_name(draft: MLPSpeculator, name: str) -> str:
    """Our name of a depth's tensor: tied weights are there once (projections twice)."""
    part, depth, kind = name.split(".")
    last = {"proj": len(draft.proj), "ln": len(draft.ln), "heads": len(draft.heads), "emb": len(draft.emb)}[part] - 1
    return f"{part}.{min(int(depth), last)}.{kind}"


def _of_depth(draft: MLPSpeculator, name: str) -> Tensor:
    if name.startswith("emb.") and not draft.emb:
        return draft.target_embedding.float() * draft.embedding_scale
    return draft.get_parameter(_own_name(draft, name))


def _check_tied(
    folder: TensorFolder, reader: Reader, draft: MLPSpeculator, tensors: dict[str, Tensor], name: str
) -> None:
    """Copies of tied weights must be copies."""
    own = _own_name(draft, name)
    if own == name or _theirs(name) not in reader:
        return
    if not torch.equal(reader.get(_theirs(name)), tensors[own]):
        raise ValueError(
            f"{folder.path}: config.json says tie_weights, but {_theirs(name)} is not the same as {_theirs(own)}"
        )
