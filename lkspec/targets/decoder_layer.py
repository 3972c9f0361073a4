"""One decoder layer of a transformers model that stands alone, for drafts built from the target's own layer."""

from __future__ import annotations

import copy
import inspect
from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface

from lkspec.nn.attention import Unrolled, attend

ATTENTION = "lkspec"  # the name under which transformers' layers find the attention below


class StandaloneLayer(nn.Module):
    """A decoder layer with its rotary embedding, trainable in float32.

    In the training-time test one ``lkspec.nn.attention.Unrolled`` is its mask and its cache. With a tensor as the mask,
    keys beyond its columns are each query's own, S slots per depth.

    Args:
        decoder: the model's stack of layers.
        layer_type: which kind of layer; the last one of that kind is taken.
        window: how many positions a query sees; None for all.
        copied: with that layer's weights; random ones otherwise, as the model's class draws them.
    """

    def __init__(self, decoder: Any, *, layer_type: str, window: int | None, copied: bool) -> None:
        super().__init__()
        config = copy.deepcopy(decoder.config)
        config._attn_implementation = ATTENTION
        types = getattr(config, "layer_types", None) or [layer_type] * config.num_hidden_layers
        index = max(i for i, kind in enumerate(types) if kind == layer_type)
        original = decoder.layers[index]
        self.layer = type(original)(config, index).float()
        if copied:
            self.layer.load_state_dict(original.state_dict())
        else:
            self.layer.apply(decoder._init_weights)
        self.layer.self_attn.layer_idx = 0  # it has its own cache
        self.rotary = copy.deepcopy(decoder.rotary_emb).float().train()  # frozen targets are in eval mode
        per_type = "layer_type" in inspect.signature(decoder.rotary_emb.forward).parameters
        self._rotary_options = {"layer_type": layer_type} if per_type else {}
        self.window = window

    def forward(
        self,
        hidden: Float[Tensor, "B S H"],
        positions: Int[Tensor, "B S"],
        mask: Bool[Tensor, "B 1 S L"] | Unrolled,
        cache: Any,
    ) -> Float[Tensor, "B S H"]:
        """The layer's output; keys and values go through ``cache.update``."""
        return self.layer(
            hidden,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            position_embeddings=self.rotary(hidden, positions, **self._rotary_options),
        )


def _attention(
    module: nn.Module,
    query: Float[Tensor, "B N S E"],
    key: Float[Tensor, "B M L E"],
    value: Float[Tensor, "B M L F"],
    attention_mask: Bool[Tensor, "B 1 S L"] | Unrolled,
    *,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Float[Tensor, " N"] | None = None,
    **_: object,
) -> tuple[Float[Tensor, "B S N F"], None]:
    """transformers' attention interface over ``attend``; released chat models use no attention dropout."""
    options: dict[str, Any] = {"scaling": scaling, "soft_cap": softcap, "sinks": s_aux}
    if isinstance(attention_mask, Unrolled):
        return attention_mask.attend(query, key, value, **options).transpose(1, 2), None
    num_keys, num_queries = attention_mask.shape[-1], query.shape[2]
    sizes = [num_keys, *[num_queries] * ((key.shape[2] - num_keys) // num_queries)]
    (keys, *own_keys), (values, *own_values) = key.split(sizes, dim=2), value.split(sizes, dim=2)
    own = tuple(zip(own_keys, own_values, strict=True))
    mixed = attend(query, keys, values, attention_mask, own, **options)
    return mixed.transpose(1, 2), None


AttentionInterface.register(ATTENTION, _attention)
