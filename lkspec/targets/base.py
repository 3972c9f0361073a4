"""The Target protocol: a frozen causal language model that drafts learn from and decoding verifies with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lkspec.nn.kv_cache import PositionCache
from lkspec.types import Batch, LinearHead, TargetSpec, TargetStates

MIN_LAYERS_FOR_DEFAULT_AUX = 7


def default_aux_layer_ids(num_layers: int) -> tuple[int, ...] | None:
    """Layers whose inputs EAGLE-3 reads unless told otherwise, in every engine; None where they would collide."""
    return (2, num_layers // 2, num_layers - 3) if num_layers >= MIN_LAYERS_FOR_DEFAULT_AUX else None


class Target(Protocol):
    """A frozen target.

    Attributes:
        name: what results rows call it.
        source: the folder or hub id it was loaded from; None for a model made in memory.
        model_config: its ``config.json``, plain data.
        head: describes its head completely; ``head.logits(states.last)`` are its logits.
        spec: what a draft for it is built from.
        num_layers: decoder layers.
        aux_layer_ids: states that enter these layers are the auxiliary ones.
        eos_ids: tokens that end a generation.
        special_ids: tokens that every draft vocabulary keeps.
        max_positions: the context limit, in tokens.
        fingerprint: a digest of its weights' identity; a draft is tied to it.
    """

    name: str
    source: str | None
    model_config: dict[str, Any]
    head: LinearHead
    spec: TargetSpec
    num_layers: int
    num_parameters: int
    aux_layer_ids: tuple[int, ...]
    eos_ids: tuple[int, ...]
    special_ids: tuple[int, ...]
    max_positions: int
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    dtype: torch.dtype
    attn_implementation: str
    fingerprint: str

    @property
    def vocab_size(self) -> int:
        """V: columns of the logits."""
        ...

    def prompt_ids(self, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        """The chat template of ``role`` and ``content`` messages up to where the answer begins."""
        ...

    def states(self, batch: Batch) -> TargetStates:
        """The target's states at every slot of a batch, each conversation by itself."""
        ...

    def new_cache(self, num_rows: int) -> PositionCache:
        """An empty cache for ``step``."""
        ...

    def save(self, folder: Path) -> None:
        """Writes it to a new folder that engines load."""
        ...

    def step(self, tokens: Int[Tensor, "B S"], positions: Int[Tensor, "B S"], cache: PositionCache) -> TargetStates:
        """Reads S more tokens a row at explicit positions; the verification forward pass of decoding."""
        ...
