"""Any causal language model of transformers, frozen, in process."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from lkspec.files import atomic_dir
from lkspec.nn.kv_cache import PositionCache
from lkspec.targets.base import MIN_LAYERS_FOR_DEFAULT_AUX, default_aux_layer_ids
from lkspec.targets.decoder_layer import StandaloneLayer
from lkspec.targets.dims import decoder_dims
from lkspec.targets.grouped_attention import grouped_sdpa
from lkspec.types import Batch, LinearHead, TargetSpec, TargetStates

_MASKED_LAYER_TYPES = {"full_attention", "sliding_attention"}


class TransformersTarget:
    """A frozen transformers model behind the Target protocol.

    Raises:
        ValueError: a folder without a model, an attention implementation or dtype that is not there, colliding
            auxiliary layers, a head that cannot be described, layers with recurrent or convolutional state.
    """

    def __init__(
        self,
        path: str,
        *,
        name: str | None = None,
        dtype: str = "float32",
        device: str = "auto",
        attn_implementation: str | None = None,
        aux_layer_ids: tuple[int, ...] | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        if "flash" in (attn_implementation or "") and importlib.util.find_spec("flash_attn") is None:
            raise ValueError(
                f"target.attn_implementation={attn_implementation} needs the package flash-attn, which is not "
                "installed: pip install 'lkspec[flash]' (a CUDA machine), or set target.attn_implementation=sdpa"
            )
        torch_dtype = parse_dtype(dtype)
        options = {"revision": revision, "trust_remote_code": trust_remote_code}
        try:
            model = AutoModelForCausalLM.from_pretrained(
                path, dtype=torch_dtype, attn_implementation=attn_implementation, use_safetensors=True, **options
            )
            tokenizer = AutoTokenizer.from_pretrained(path, **options)
        except (OSError, ValueError) as error:
            raise ValueError(
                "target.path: expected a model folder or a hub id of a causal language model with safetensors "
                f"weights and a tokenizer, got {path!r} ({' '.join(str(error).split())})"
            ) from error
        name = name or Path(path).name
        self._init_from(model, tokenizer, name=name, aux_layer_ids=aux_layer_ids, device=device, source=path)

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str,
        aux_layer_ids: tuple[int, ...] | None = None,
        device: str = "auto",
    ) -> TransformersTarget:
        """Wraps a model that is already in memory."""
        target = cls.__new__(cls)
        target._init_from(model, tokenizer, name=name, aux_layer_ids=aux_layer_ids, device=device)
        return target

    def save(self, folder: Path) -> None:
        """Writes it as a folder that transformers and engines load (config, weights in its dtype, tokenizer), whole or
        not at all.

        Raises:
            ValueError: something is there already.
        """
        if folder.exists():
            raise ValueError(f"{folder}: expected a new place for {self.name}, there is something already")
        with atomic_dir(folder) as temporary:
            self.model.save_pretrained(temporary)
            self.tokenizer.save_pretrained(temporary)

    def _init_from(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str,
        aux_layer_ids: tuple[int, ...] | None,
        device: str,
        source: str | None = None,
    ) -> None:
        self.name = name
        self.source = source
        self.device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        self.model = model.eval().requires_grad_(False).to(self.device)
        self.dtype = self.model.dtype
        self.tokenizer = tokenizer
        self.config = self.model.config.get_text_config()
        self.model_config = {**self.model.config.to_dict(), "architectures": [type(self.model).__name__]}
        self.attn_implementation = str(self.config._attn_implementation)
        if "flash" in self.attn_implementation and self.device.type != "cuda":
            raise ValueError(f"{self.attn_implementation} needs a CUDA device, got {self.device}")
        self.num_layers = int(self.config.num_hidden_layers)
        self.num_parameters = sum(p.numel() for p in self.model.parameters())
        self._layer_types = _layer_types(self.config, name)
        self._decoder = _checked_decoder(self.model, name)
        self.aux_layer_ids = _checked_aux_layers(aux_layer_ids, self.num_layers, name)
        self.max_positions = int(self.config.max_position_embeddings)
        self.embedding = self.model.get_input_embeddings().weight.detach()
        self.eos_ids = _eos_ids(self.model, tokenizer)
        special = (i for i in tokenizer.all_special_ids if i < self.embedding.shape[0])
        self.special_ids = tuple(sorted({*self.eos_ids, *special}))
        self.head = self._checked_head()
        self.spec = TargetSpec(
            dims=decoder_dims(self.config),
            embedding=self.embedding,
            head=self.head,
            num_aux=len(self.aux_layer_ids),
            model_type=str(self.config.model_type),
            new_layer=self._new_layer,
        )
        self.fingerprint = self._fingerprint()

    def _new_layer(self, copied: bool) -> StandaloneLayer:
        kind = "full_attention" if "full_attention" in self._layer_types else next(iter(self._layer_types))
        return StandaloneLayer(self._decoder, layer_type=kind, window=self._layer_types[kind], copied=copied)

    @property
    def vocab_size(self) -> int:
        return self.head.weight.shape[0]

    def prompt_ids(self, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        return tuple(self.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=False))

    @torch.no_grad()
    def states(self, batch: Batch) -> TargetStates:
        batch = batch.to(self.device)
        # Rows padded on the right need no mask: no real token sees the padding behind it.
        mask = self._packed_mask(batch) if batch.is_packed else None
        return self._forward(batch.tokens, batch.positions, mask, None)

    def new_cache(self, num_rows: int) -> PositionCache:
        return PositionCache(num_rows)

    @torch.no_grad()
    def step(self, tokens: Int[Tensor, "B S"], positions: Int[Tensor, "B S"], cache: PositionCache) -> TargetStates:
        cache.at(positions)
        masks = {layer_type: cache.mask(window) for layer_type, window in self._layer_types.items()}
        # Measured on CPUs only; kernels of other devices choose by the form of mask and heads.
        is_grouped = self.attn_implementation == "sdpa" and self.device.type == "cpu"
        with grouped_sdpa(self.config) if is_grouped else nullcontext():
            return self._forward(tokens, positions, self._as_model_mask(masks), cache)

    def _forward(
        self, tokens: Tensor, positions: Tensor, mask: Tensor | dict[str, Tensor] | None, cache: PositionCache | None
    ) -> TargetStates:
        with self._recorded_layer_inputs() as entered:
            output = self._decoder(
                input_ids=tokens,
                position_ids=positions,
                attention_mask=mask,
                past_key_values=cache,
                use_cache=cache is not None,
            )
        return TargetStates(aux=torch.cat(entered, dim=-1), last=output.last_hidden_state)

    @contextmanager
    def _recorded_layer_inputs(self) -> Iterator[list[Tensor]]:
        """What enters the auxiliary layers while the decoder runs, from the lowest up."""
        entered: list[Tensor] = []

        def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            entered.append(args[0] if args else kwargs["hidden_states"])

        with ExitStack() as hooks:
            for layer in self.aux_layer_ids:
                hooks.enter_context(self._decoder.layers[layer].register_forward_pre_hook(record, with_kwargs=True))
            yield entered

    def _packed_mask(self, batch: Batch) -> Tensor | dict[str, Tensor]:
        same = (batch.segments[:, :, None] == batch.segments[:, None, :])[:, None]
        distance = (batch.positions[:, :, None] - batch.positions[:, None, :])[:, None]
        visible = same & (distance >= 0)
        masks = {
            kind: visible if window is None else visible & (distance < window)
            for kind, window in self._layer_types.items()
        }
        return self._as_model_mask(masks)

    def _as_model_mask(self, masks: dict[str, Bool[Tensor, "B 1 S L"]]) -> Tensor | dict[str, Tensor]:
        """Masks in the form that the attention implementation reads: bool for sdpa, additive for eager."""
        if "flash" in self.attn_implementation:
            raise ValueError(
                f"{self.name}: cached decoding and packed rows need explicit attention masks, which "
                f"{self.attn_implementation} cannot take; set target.attn_implementation=sdpa (or eager)"
            )
        prepared: dict[str, Tensor] = dict(masks)
        if self.attn_implementation == "eager":
            lowest = torch.finfo(self.dtype).min
            prepared = {kind: torch.where(mask, 0.0, lowest).to(self.dtype) for kind, mask in masks.items()}
        # Models with one kind of layer read a single mask.
        return prepared if len(self._layer_types) > 1 else next(iter(prepared.values()))

    @torch.no_grad()
    def _checked_head(self) -> LinearHead:
        """Describes the head and checks head(last hidden) = model logits (contract 3)."""
        output = self.model.get_output_embeddings()
        scale = getattr(self.config, "logit_scale", None) or 1.0
        bias = getattr(output, "bias", None)
        head = LinearHead(
            weight=output.weight.detach(),
            bias=None if bias is None else bias.detach(),
            scale=float(scale / (getattr(self.config, "logits_scaling", None) or 1.0)),
            soft_cap=getattr(self.config, "final_logit_softcapping", None),
        )
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, self.embedding.shape[0], (1, 8), generator=generator).to(self.device)
        positions = torch.arange(8, device=self.device)[None]
        expected = self.model(input_ids=tokens, position_ids=positions, use_cache=False).logits.float()
        described = head.logits(self._forward(tokens, positions, None, None).last).float()
        tolerance = 1e-4 if self.dtype == torch.float32 else 2e-2
        error = float((expected - described).abs().max() / expected.abs().max().clamp_min(1e-6))
        if not error <= tolerance:
            raise ValueError(
                f"{self.name}: its logits are not soft_cap(scale * W h + bias) of its last hidden state "
                f"(relative error {error:.1e}, allowed {tolerance:.0e}); this model's head is not supported"
            )
        return head

    def _fingerprint(self) -> str:
        """Digest of a sample of every parameter, rounded to bfloat16 so that loading in another dtype keeps it."""
        digest = hashlib.sha256(f"{type(self.model).__name__} {self.num_parameters}".encode())
        for name, parameter in self.model.named_parameters():
            sample = parameter.detach().flatten()[:: max(1, parameter.numel() // 512)].to(torch.bfloat16)
            digest.update(name.encode() + sample.view(torch.int16).cpu().numpy().tobytes())
        return digest.hexdigest()[:16]


def parse_dtype(name: str) -> torch.dtype:
    """A torch dtype by name.

    Raises:
        ValueError: a name that is none of float32, bfloat16, float16.
    """
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise ValueError(f"dtype: expected one of {', '.join(known)}, got {name!r}")
    return known[name]


def _checked_decoder(model: Any, name: str) -> Any:
    """The decoder, whose layers are hooked and whose positions are set explicitly."""
    decoder = model.get_decoder()
    if not hasattr(decoder, "layers") or "position_ids" not in inspect.signature(decoder.forward).parameters:
        raise ValueError(
            f"{name}: a target's decoder must have `layers` and take `position_ids`, {type(decoder).__name__} does "
            "not; Llama, Qwen, Gemma, Mistral, gpt-oss and similar models do"
        )
    return decoder


def _checked_aux_layers(ids: tuple[int, ...] | None, num_layers: int, name: str) -> tuple[int, ...]:
    if ids is None:
        defaults = default_aux_layer_ids(num_layers)
        if defaults is None:
            raise ValueError(
                f"{name}: the default auxiliary layers (2, n//2, n-3) collide for {num_layers} layers; "
                f"they need at least {MIN_LAYERS_FOR_DEFAULT_AUX}. Set target.aux_layer_ids to distinct layers"
            )
        return defaults
    ids = tuple(int(i) for i in ids)
    if list(ids) != sorted(set(ids)) or not all(0 <= i < num_layers for i in ids):
        raise ValueError(
            f"{name}: target.aux_layer_ids must be distinct, ascending and in [0, {num_layers}), got {list(ids)}"
        )
    return ids


def _layer_types(config: Any, name: str) -> dict[str, int | None]:
    """Each kind of attention layer with its window (None = full), refusing state that cannot be rolled back."""
    if getattr(config, "is_heterogeneous", False):
        differing = ", ".join(sorted(config.per_layer_attributes))
        raise ValueError(f"{name}: its layers differ in {differing}, and a draft can mirror only one kind of layer")
    window = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) is False:
        window = None
    types = getattr(config, "layer_types", None)
    if types is None:
        return {"full_attention": window}
    unsupported = sorted(set(types) - _MASKED_LAYER_TYPES)
    if unsupported:
        raise ValueError(
            f"{name}: layers of type {', '.join(unsupported)} are not supported, only "
            f"{' and '.join(sorted(_MASKED_LAYER_TYPES))}: decoding must take rejected tokens back, which recurrent "
            "and convolutional state does not allow"
        )
    return {kind: (window if kind == "sliding_attention" else None) for kind in sorted(set(types))}


def _eos_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every id that ends a generation, from the generation config and the tokenizer."""
    named = (getattr(model.generation_config, "eos_token_id", None), tokenizer.eos_token_id)
    found = {int(token) for value in named if value is not None for token in np.atleast_1d(value)}
    if not found:
        raise ValueError(f"{tokenizer.name_or_path}: neither the model nor the tokenizer names an end-of-text token")
    return tuple(sorted(found))
