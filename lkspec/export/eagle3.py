"""EAGLE-3 in the plain layout of vLLM and SGLang (``LlamaForCausalLMEagle3``), and in that of the library speculators.

In both, ``d2t`` [D] holds offsets (target id = draft id + d2t[draft id]), ``t2d`` [V] membership; a draft vocabulary
that is the target's has neither.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from lkspec.drafts.eagle3 import Eagle3
from lkspec.export.base import Layout, WriteOptions
from lkspec.export.serving import SAMPLES, ServeCommand
from lkspec.export.tensor_folder import TensorFolder
from lkspec.targets.base import Target, default_aux_layer_ids
from lkspec.targets.dims import different_words, dims_from_words, llama_words
from lkspec.types import DecoderDims

_NUM_AUX = 3
_LAYERS = "eagle_aux_hidden_state_layer_ids"
_VERSION = "0.9.0"  # of the library speculators, whose format this is


class PlainEagle3(Layout):
    """Tensors by our names, Llama's words at the top of config.json.

    ``embed_tokens`` is left out, which means the target's. The config names no auxiliary layers: both engines then take
    the states that enter layers 2, n//2, n-3.
    """

    format = "vllm"
    draft_class = Eagle3
    loaded_by = "vLLM (its loaders of 0.10 to 0.33) and SGLang (0.5.23)"
    vllm: ClassVar = {"method": "eagle3", **SAMPLES}
    sglang: ClassVar[str | None] = "EAGLE3"
    aliases: ClassVar = {**Layout.aliases, "layers.0.": "midlayer."}
    ignored = ("d2t", "t2d", "*rotary_emb.inv_freq")
    arguments: ClassVar = {"norm_before_residual": "norm_before_residual"}
    fixed: ClassVar = {"head_init": "random"}
    required = ("hidden_size", "intermediate_size", "num_attention_heads")
    only: ClassVar = {
        "hidden_act": "silu",
        "num_hidden_layers": 1,
        "attention_bias": False,
        "mlp_bias": False,
        "norm_before_fc": False,
        "fc_norm": False,
        "norm_output": False,
        "use_sliding_window": False,
        "logit_scale": 1.0,
    }

    def recognises(self, folder: TensorFolder) -> bool:
        config = folder.config
        # Some tools write plain Llama's name as the architecture; only drafts have a draft vocabulary.
        named = any("eagle3" in name.lower() for name in config.get("architectures") or ())
        return "speculators_model_type" not in config and (named or "draft_vocab_size" in config)

    def settings(self, folder: TensorFolder) -> dict[str, Any]:
        settings, layer = super().settings(folder), self.layer_config(folder)
        if layer.get("sliding_window") is not None and layer.get("use_sliding_window") is not False:
            raise ValueError(f"{folder.path}: its layer has a sliding window, which lkspec's EAGLE-3 has not")
        return {**settings, "layer": llama_words(dims_from_words(layer, hidden_size=layer["hidden_size"]))}

    def row_ids(self, folder: TensorFolder, target_size: int) -> Int[Tensor, " D"]:
        reader = self.reader(folder)
        if "d2t" not in reader.stored:
            size = folder.config.get("draft_vocab_size") or target_size
            if size != target_size:
                raise ValueError(
                    f"{folder.path}: there is no tensor d2t for its {size} of the target's {target_size} tokens"
                )
            return torch.arange(target_size)
        offsets = reader.get("d2t")
        ids = torch.arange(len(offsets)) + offsets
        if bool((ids < 0).any() | (ids >= target_size).any()) or len(ids.unique()) != len(ids):
            raise ValueError(
                f"{folder.path}: d2t must hold offsets to different tokens of the target's {target_size}; it leads to "
                f"{int(ids.min())}..{int(ids.max())}, {len(ids.unique())} of {len(ids)} different"
            )
        if "t2d" in reader.stored and not torch.equal(reader.get("t2d").nonzero()[:, 0], ids.sort().values):
            raise ValueError(f"{folder.path}: d2t and t2d name different tokens")
        return ids

    def check_target(self, folder: TensorFolder, target: Target) -> None:
        super().check_target(folder, target)
        ids = self.aux_layer_ids(folder, target.num_layers)
        if ids is None:
            raise ValueError(
                f"{folder.path}: its config names no auxiliary layers and the defaults (2, n//2, n-3) collide for the "
                f"{target.num_layers} layers of {target.name}"
            )
        if ids != target.aux_layer_ids:
            raise ValueError(
                f"{folder.path}: the draft reads the states that enter layers {list(ids)} of the target, but "
                f"{target.name} gives those of {list(target.aux_layer_ids)}; set "
                f"target.aux_layer_ids=[{','.join(map(str, ids))}]"
            )

    def aux_layer_ids(self, folder: TensorFolder, num_layers: int) -> tuple[int, ...] | None:
        """Layers whose inputs the draft reads, our meaning; None where there are no defaults.

        A list at the top of the config is vLLM's (the input of layer i), one inside ``eagle_config`` SGLang's and
        SpecForge's (the output of layer i).
        """
        if folder.config.get(_LAYERS):
            return tuple(int(i) for i in folder.config[_LAYERS])
        outputs = (folder.config.get("eagle_config") or {}).get(_LAYERS)
        return tuple(int(i) + 1 for i in outputs) if outputs else default_aux_layer_ids(num_layers)

    def shared(self, draft: Eagle3, config: Any) -> dict[str, Tensor]:
        return {"embed_tokens.weight": draft.embedding}

    def stored(self, draft: Eagle3, config: Any) -> dict[str, Tensor]:
        num_aux = draft.fc.weight.shape[1] // draft.dims.hidden_size
        if num_aux != _NUM_AUX:
            raise ValueError(f"EAGLE-3 in engines reads {_NUM_AUX} auxiliary states, this draft {num_aux}")
        maps = {} if draft.vocab.is_full else {"d2t": draft.vocab.d2t, "t2d": draft.vocab.t2d}
        return super().stored(draft, config) | maps

    def config(self, draft: Eagle3, target: Target, options: WriteOptions) -> dict[str, Any]:
        if target.aux_layer_ids != default_aux_layer_ids(target.num_layers):
            raise ValueError(
                f"format=vllm names no auxiliary layers, since vLLM and SGLang read such names differently; this run's "
                f"are {list(target.aux_layer_ids)}, not the default (2, n//2, n-3) of {target.num_layers} layers. "
                "format=speculators names them (vLLM only); or train without target.aux_layer_ids"
            )
        return {
            "architectures": ["LlamaForCausalLMEagle3"],
            **_layer_words(draft.dims, draft.vocab.target_size),
            "draft_vocab_size": draft.vocab.size,
        }

    def misdescribed(self, folder: TensorFolder, draft: Eagle3) -> list[str]:
        layer = self.layer_config(folder)
        written = dims_from_words(layer, hidden_size=layer["hidden_size"])
        return super().misdescribed(folder, draft) + different_words(written, draft.dims)

    def facts(self, folder: TensorFolder, draft: Eagle3, target: Target) -> list[str]:
        ours, theirs, vocab = draft.dims, target.spec.dims, draft.vocab
        layers = f"those that enter layers {', '.join(map(str, target.aux_layer_ids))} of {target.num_layers}"
        named = _LAYERS in folder.config
        rope = {"rope_type": "default", "rope_theta": 10_000.0, **ours.rope_parameters}
        is_targets = ours.inv_freq.shape == theirs.inv_freq.shape and torch.allclose(ours.inv_freq, theirs.inv_freq)
        beyond = f"; the target has {target.max_positions:,}: vLLM clamps the draft's RoPE beyond its own"
        lacking = [i for i in target.special_ids if not bool(vocab.t2d[i])]
        special = f"it lacks the target's special tokens {lacking[:5]}"
        return [
            f"auxiliary states: {layers}"
            + ("; the config names them" if named else ", the default of vLLM and SGLang; the config names none"),
            f"RoPE: {rope['rope_type']}, theta {rope['rope_theta']:g}, head size {ours.head_dim}: as in training, "
            f"{'the same as' if is_targets else 'other frequencies than'} the target's",
            f"norms: RMSNorm, eps {ours.rms_norm_eps:g}, norm_before_residual "
            + ("true (vLLM only: SGLang's layer does not know it)" if draft.norm_before_residual else "false"),
            f"positions: {ours.max_positions:,}"
            + (", as the target" if ours.max_positions == target.max_positions else beyond),
            f"vocabulary: all {target.vocab_size:,} tokens of the target, no d2t"
            if vocab.is_full
            else f"vocabulary: {vocab.size:,} of the target's {target.vocab_size:,} tokens; d2t and t2d name the same; "
            + (special if lacking else "all special tokens are among them"),
        ]

    def serve_commands(self, draft: Eagle3, target_path: str, path: str, options: WriteOptions) -> list[ServeCommand]:
        commands = super().serve_commands(draft, target_path, path, options)
        return commands[:1] if draft.norm_before_residual else commands  # SGLang's layer does not know it


class SpeculatorsEagle3(PlainEagle3):
    """The layout of the library speculators (``Eagle3Speculator``), which vLLM loads without flags.

    The plain tensors with ``layers.0.`` in place of ``midlayer.`` and a copy of the target's ``embed_tokens``; the
    config describes the layer inside ``transformer_layer_config`` and names auxiliary layers (input of layer i) and the
    target.
    """

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
            "speculators_version": _VERSION,
            "draft_vocab_size": draft.vocab.size,
            "target_hidden_size": target.spec.dims.hidden_size,
            _LAYERS: list(target.aux_layer_ids),
            "transformer_layer_config": _layer_words(draft.dims, draft.vocab.target_size),
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


def _layer_words(dims: DecoderDims, vocab_size: int) -> dict[str, Any]:
    """The decoder layer as a Llama config, RoPE both in today's words and in those before transformers 5."""
    scaling = {key: value for key, value in dims.rope_parameters.items() if key != "rope_theta"}
    return {
        "model_type": "llama",
        "hidden_size": dims.hidden_size,
        "hidden_act": "silu",
        "num_hidden_layers": 1,
        "vocab_size": vocab_size,
        **llama_words(dims),
        "rope_theta": dims.rope_parameters.get("rope_theta", 10_000.0),
        "rope_scaling": None if scaling.get("rope_type", "default") == "default" else scaling,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
    }
