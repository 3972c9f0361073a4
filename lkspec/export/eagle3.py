"""EAGLE-3 in the plain layout of vLLM and SGLang (``LlamaForCausalLMEagle3``).

Tensors carry our names but for the vocabulary: ``d2t`` [D] holds offsets (target id = draft id + d2t[draft id]),
``t2d`` [V] membership; both are left out when the vocabulary is the target's. ``embed_tokens`` is left out, which means
the target's. The config names no auxiliary layers: both engines then take the states that enter layers 2, n//2, n-3.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from lkspec.drafts.base import Draft
from lkspec.drafts.eagle3 import Eagle3
from lkspec.export.base import (
    Layout,
    Reader,
    ServeCommand,
    WriteOptions,
    dtype_name,
    refuse_other_values,
    same_as_target,
    sorted_ids,
    whole_config,
    write_checkpoint,
)
from lkspec.export.tensor_folder import TensorFolder
from lkspec.targets.base import Target, default_aux_layer_ids
from lkspec.targets.dims import dims_from_words, llama_words
from lkspec.types import DecoderDims

_LAYER_ALIAS = "layers.0."
_LAYER = "midlayer."
_NUM_AUX = 3
_ONLY: dict[str, Any] = {
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


class PlainEagle3(Layout):
    """``model.safetensors`` without a prefix, Llama's words at the top of config.json."""

    format = "vllm"
    draft_class = Eagle3
    served_by = "vLLM (its loaders of 0.10 to 0.33) and SGLang (0.5.23)"

    def recognises(self, folder: TensorFolder) -> bool:
        config = folder.config
        # Some tools write plain Llama's name as the architecture; only drafts have a draft vocabulary.
        named = any("eagle3" in name.lower() for name in config.get("architectures") or ())
        return "speculators_model_type" not in config and (named or "draft_vocab_size" in config)

    def layer_config(self, folder: TensorFolder) -> dict[str, Any]:
        """What describes the decoder layer, in Llama's words."""
        return folder.config

    def settings(self, folder: TensorFolder) -> dict[str, Any]:
        config, layer = folder.config, self.layer_config(folder)
        whole_config(folder, layer, ("hidden_size", "intermediate_size", "num_attention_heads"))
        refuse_other_values(folder, {**config, **layer}, _ONLY)
        if layer.get("sliding_window") is not None and layer.get("use_sliding_window") is not False:
            raise ValueError(f"{folder.path}: its layer has a sliding window, which lkspec's EAGLE-3 has not")
        dims = dims_from_words(layer, hidden_size=layer["hidden_size"])
        return {
            "head_init": "random",  # overwritten
            "norm_before_residual": bool(config.get("norm_before_residual", False)),
            "layer": llama_words(dims),
        }

    def vocab_ids(self, folder: TensorFolder, target_size: int) -> Int[Tensor, " D"]:
        return sorted_ids(_target_ids(folder, target_size))[0]

    def check_target(self, folder: TensorFolder, target: Target) -> None:
        layer = self.layer_config(folder)
        for what, theirs, ours in (
            ("hidden_size", layer["hidden_size"], target.spec.dims.hidden_size),
            ("vocab_size", layer.get("vocab_size", target.vocab_size), target.vocab_size),
        ):
            if theirs != ours:
                raise ValueError(f"{folder.path}: made for a target with {what} {theirs}, {target.name} has {ours}")
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
        config = folder.config
        if config.get("eagle_aux_hidden_state_layer_ids"):
            return tuple(int(i) for i in config["eagle_aux_hidden_state_layer_ids"])
        outputs = (config.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
        return tuple(int(i) + 1 for i in outputs) if outputs else default_aux_layer_ids(num_layers)

    def tensors(self, folder: TensorFolder, draft: Draft) -> dict[str, Tensor]:
        assert isinstance(draft, Eagle3)
        reader = Reader(folder, _canonical)
        tensors = {name: reader.get(name) for name in draft.state_dict() if name != "vocab.ids"}
        tensors["lm_head.weight"] = tensors["lm_head.weight"][
            sorted_ids(_target_ids(folder, draft.vocab.target_size))[1]
        ]
        for name in reader.names:
            if name in ("d2t", "t2d") or name.endswith("rotary_emb.inv_freq"):  # the config's, said once more
                reader.skip(name)
        if "embed_tokens.weight" in reader:
            same_as_target(folder, "embed_tokens.weight", reader.get("embed_tokens.weight"), draft.embedding)
        reader.finish()
        return tensors

    def write(self, folder: Path, draft: Draft, target: Target, options: WriteOptions) -> None:
        assert isinstance(draft, Eagle3)
        if target.aux_layer_ids != default_aux_layer_ids(target.num_layers):
            raise ValueError(
                f"format=vllm names no auxiliary layers, since vLLM and SGLang read such names differently; this run's "
                f"are {list(target.aux_layer_ids)}, not the default (2, n//2, n-3) of {target.num_layers} layers. "
                "format=speculators names them (vLLM only); or train without target.aux_layer_ids"
            )
        config = {
            "architectures": ["LlamaForCausalLMEagle3"],
            "model_type": "llama",
            **layer_words(draft.dims, draft.vocab.target_size),
            "draft_vocab_size": draft.vocab.size,
            "norm_before_residual": draft.midlayer.norm_before_residual,
            "torch_dtype": dtype_name(options.dtype),
        }
        write_checkpoint(folder, stored_tensors(draft), config, options.dtype)

    def checks(self, folder: TensorFolder, draft: Draft, target: Target) -> list[str]:
        assert isinstance(draft, Eagle3)
        self.check_target(folder, target)
        return [
            self._aux_check(target),
            *_layer_checks(folder, self.layer_config(folder), draft, target),
            _vocabulary_check(folder, draft, target),
        ]

    def _aux_check(self, target: Target) -> str:
        return (
            f"auxiliary states: those that enter layers {_listed(target.aux_layer_ids)} of {target.num_layers}, the "
            "default of vLLM and SGLang; the config names none"
        )

    def serve_commands(self, draft: Draft, target_path: str, path: str, options: WriteOptions) -> list[ServeCommand]:
        assert isinstance(draft, Eagle3)
        num_draft_tokens = options.num_draft_tokens
        commands = [vllm_command(target_path, path, num_draft_tokens)]
        if not draft.midlayer.norm_before_residual:  # SGLang's layer does not know it
            commands.append(
                ServeCommand(
                    "SGLang",
                    f"python -m sglang.launch_server --model-path {target_path} --speculative-algorithm EAGLE3 "
                    f"--speculative-draft-model-path {path} --speculative-num-steps {num_draft_tokens} "
                    f"--speculative-eagle-topk 1 --speculative-num-draft-tokens {num_draft_tokens + 1} "
                    "--speculative-use-rejection-sampling",
                    "--speculative-use-rejection-sampling (with --speculative-eagle-topk 1)",
                )
            )
        return commands


def vllm_command(target_path: str, path: str, num_draft_tokens: int) -> ServeCommand:
    """vLLM with an EAGLE-3 draft of either layout."""
    options = {
        "method": "eagle3",
        "model": path,
        "num_speculative_tokens": num_draft_tokens,
        "draft_sample_method": "probabilistic",
    }
    return ServeCommand(
        "vLLM",
        f"vllm serve {target_path} --speculative-config '{json.dumps(options)}'",
        '"draft_sample_method": "probabilistic" (its name differs in older versions)',
    )


def layer_words(dims: DecoderDims, vocab_size: int) -> dict[str, Any]:
    """The decoder layer as a Llama config, RoPE both in today's words and in those before transformers 5."""
    scaling = {key: value for key, value in dims.rope_parameters.items() if key != "rope_theta"}
    return {
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


def stored_tensors(draft: Eagle3) -> dict[str, Tensor]:
    """All tensors of the plain layout.

    Raises:
        ValueError: another number of auxiliary states than the engines concatenate.
    """
    num_aux = draft.fc.weight.shape[1] // draft.dims.hidden_size
    if num_aux != _NUM_AUX:
        raise ValueError(f"EAGLE-3 in engines reads {_NUM_AUX} auxiliary states, this draft {num_aux}")
    tensors = {name: tensor for name, tensor in draft.state_dict().items() if name != "vocab.ids"}
    if not draft.vocab.is_full:
        tensors |= {"d2t": draft.vocab.d2t, "t2d": draft.vocab.t2d}
    return tensors


def _canonical(name: str) -> str:
    return _LAYER + name.removeprefix(_LAYER_ALIAS) if name.startswith(_LAYER_ALIAS) else name


def _target_ids(folder: TensorFolder, target_size: int) -> Int[Tensor, " D"]:
    """Target id of each row of the head, in the checkpoint's own order."""
    reader = Reader(folder, _canonical)
    if "d2t" not in reader:
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
    if "t2d" in reader and not torch.equal(reader.get("t2d").nonzero()[:, 0], ids.sort().values):
        raise ValueError(f"{folder.path}: d2t and t2d name different tokens")
    return ids


def _layer_checks(folder: TensorFolder, config: Mapping[str, Any], draft: Eagle3, target: Target) -> list[str]:
    written = dims_from_words(config, hidden_size=config["hidden_size"])
    theirs, ours = llama_words(written), llama_words(draft.dims)
    wrong = [key for key in ours if key != "rope_parameters" and theirs[key] != ours[key]]
    same_rope = torch.allclose(written.inv_freq, draft.dims.inv_freq, rtol=1e-6, atol=0)
    if not same_rope or written.rope_attention_factor != draft.dims.rope_attention_factor:
        wrong.append("rope_parameters")
    if wrong:
        raise ValueError(f"{folder.path}: config.json does not describe the draft's {', '.join(wrong)}")
    rope, dims = draft.dims.rope_parameters, target.spec.dims
    is_targets = written.inv_freq.shape == dims.inv_freq.shape and torch.allclose(written.inv_freq, dims.inv_freq)
    positions = written.max_positions
    return [
        f"RoPE: {rope.get('rope_type', 'default')}, theta {rope.get('rope_theta', 10_000.0):g}, head size "
        f"{written.head_dim}: as in training, {'the same as' if is_targets else 'other frequencies than'} the target's",
        f"norms: RMSNorm, eps {written.rms_norm_eps:g}, norm_before_residual "
        f"{str(draft.midlayer.norm_before_residual).lower()}"
        + (" (vLLM only: SGLang's layer does not know it)" if draft.midlayer.norm_before_residual else ""),
        f"positions: {positions:,}"
        + (
            ", as the target"
            if positions == target.max_positions
            else f"; the target has {target.max_positions:,}: vLLM clamps the draft's RoPE beyond its own"
        ),
    ]


def _vocabulary_check(folder: TensorFolder, draft: Eagle3, target: Target) -> str:
    ids = _target_ids(folder, target.vocab_size)
    if not torch.equal(ids, draft.vocab.ids.cpu()):
        raise ValueError(f"{folder.path}: d2t does not lead to the draft's vocabulary")
    if draft.vocab.is_full:
        return f"vocabulary: all {target.vocab_size:,} tokens of the target, no d2t"
    lacking = [i for i in target.special_ids if not bool(draft.vocab.t2d[i])]
    return (
        f"vocabulary: {draft.vocab.size:,} of the target's {target.vocab_size:,} tokens; d2t and t2d name the same; "
        + (f"it lacks the target's special tokens {lacking[:5]}" if lacking else "all special tokens are among them")
    )


def _listed(ids: tuple[int, ...]) -> str:
    return ", ".join(map(str, ids))
