"""EAGLE-3 in the layout of the library speculators, which vLLM loads without flags.

The tensors of the plain layout with ``layers.0.`` in place of ``midlayer.`` and a copy of the target's
``embed_tokens``. The layer is described inside ``transformer_layer_config``; auxiliary layers (input of layer i) and
the target are named.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from lkspec.drafts.eagle3 import Eagle3
from lkspec.export.base import Layout, WriteOptions
from lkspec.export.eagle3 import PlainEagle3, layer_words
from lkspec.export.tensor_folder import TensorFolder
from lkspec.targets.base import Target

VERSION = "0.9.0"  # of the library, whose format this is


class SpeculatorsEagle3(PlainEagle3):
    """``Eagle3Speculator``."""

    format = "speculators"
    loaded_by = "vLLM from 0.10; SGLang reads the plain layout (format=vllm) only"
    sglang = None
    aliases: ClassVar = {**Layout.aliases, "midlayer.": "layers.0."}

    def recognises(self, folder: TensorFolder) -> bool:
        return folder.config.get("speculators_model_type") == "eagle3"

    def layer_config(self, folder: TensorFolder) -> dict[str, Any]:
        layer: dict[str, Any] | None = folder.config.get("transformer_layer_config")
        if layer is None:
            raise ValueError(f"{folder.path}: config.json has no transformer_layer_config")
        return layer

    def stored(self, draft: Eagle3, config: Any) -> dict[str, Tensor]:
        return super().stored(draft, config) | self.shared(draft, config)

    def config(self, draft: Eagle3, target: Target, options: WriteOptions) -> dict[str, Any]:
        method = {
            "proposal_type": "greedy",  # the only one there is; what an engine does is its own option
            "speculative_tokens": options.num_draft_tokens,
            "verifier_accept_k": 1,
            "accept_tolerance": 0.0,
        }
        return {
            "architectures": ["Eagle3Speculator"],
            "speculators_model_type": "eagle3",
            "speculators_version": VERSION,
            "draft_vocab_size": draft.vocab.size,
            "target_hidden_size": target.spec.dims.hidden_size,
            "eagle_aux_hidden_state_layer_ids": list(target.aux_layer_ids),
            "transformer_layer_config": layer_words(draft.dims, draft.vocab.target_size),
            "speculators_config": {
                "algorithm": "eagle3",
                "default_proposal_method": "greedy",
                "proposal_methods": [method],
                "verifier": {
                    "name_or_path": options.target_path(target),
                    "architectures": target.model_config["architectures"],
                },
            },
        }
