"""EAGLE-3 in the layout of the library speculators, which vLLM loads without flags.

The tensors of the plain layout with ``layers.0.`` in place of ``midlayer.`` and a copy of the target's
``embed_tokens``. The layer is described inside ``transformer_layer_config``; auxiliary layers (input of layer i) and
the target are named.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lkspec.drafts.base import Draft
from lkspec.drafts.eagle3 import Eagle3
from lkspec.export.base import ServeCommand, WriteOptions, dtype_name, whole_config, write_checkpoint
from lkspec.export.eagle3 import PlainEagle3, layer_words, stored_tensors, vllm_command
from lkspec.export.tensor_folder import TensorFolder
from lkspec.targets.base import Target

VERSION = "0.9.0"  # of the library, whose format this is


class SpeculatorsEagle3(PlainEagle3):
    """``Eagle3Speculator``."""

    format = "speculators"
    served_by = "vLLM from 0.10; SGLang reads the plain layout (format=vllm) only"

    def recognises(self, folder: TensorFolder) -> bool:
        return folder.config.get("speculators_model_type") == "eagle3"

    def layer_config(self, folder: TensorFolder) -> dict[str, Any]:
        whole_config(folder, folder.config, ("transformer_layer_config",))
        layer: dict[str, Any] = folder.config["transformer_layer_config"]
        return layer

    def write(self, folder: Path, draft: Draft, target: Target, options: WriteOptions) -> None:
        assert isinstance(draft, Eagle3)
        tensors = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in stored_tensors(draft).items()}
        tensors["embed_tokens.weight"] = draft.embedding
        layer = layer_words(draft.dims, draft.vocab.target_size)
        method = {
            "proposal_type": "greedy",  # the only one there is; what an engine does is its own option
            "speculative_tokens": options.num_draft_tokens,
            "verifier_accept_k": 1,
            "accept_tolerance": 0.0,
        }
        config = {
            "architectures": ["Eagle3Speculator"],
            "speculators_model_type": "eagle3",
            "speculators_version": VERSION,
            "draft_vocab_size": draft.vocab.size,
            "norm_before_residual": draft.midlayer.norm_before_residual,
            "target_hidden_size": target.spec.dims.hidden_size,
            "eagle_aux_hidden_state_layer_ids": list(target.aux_layer_ids),
            "transformer_layer_config": {"model_type": "llama", **layer},
            "speculators_config": {
                "algorithm": "eagle3",
                "default_proposal_method": "greedy",
                "proposal_methods": [method],
                "verifier": {
                    "name_or_path": options.target_path(target),
                    "architectures": target.model_config["architectures"],
                },
            },
            "torch_dtype": dtype_name(options.dtype),
        }
        write_checkpoint(folder, tensors, config, options.dtype)

    def _aux_check(self, target: Target) -> str:
        ids = ", ".join(map(str, target.aux_layer_ids))
        return f"auxiliary states: those that enter layers {ids} of {target.num_layers}; the config names them"

    def serve_commands(self, draft: Draft, target_path: str, path: str, options: WriteOptions) -> list[ServeCommand]:
        return [vllm_command(target_path, path, options.num_draft_tokens)]
