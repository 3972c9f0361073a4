"""Multi-token prediction (DeepSeek-V3, arXiv 2412.19437): one layer of the target's own kind, reused over depths.

At anchor t and depth k, with m_0 = the target's last hidden state (after its final norm)::

    u = eh_proj([enorm(E x_{t+k}) ; hnorm(m_{k-1})]),   m_k = norm(layer(u)),   logits = head(m_k)

so that the next depth reads the normalised output, as the engines do. Keys: depth 1 of all anchors <= t, then this
anchor's own depths 2..k; RoPE position t + k - 1. The embedding E and the head are the target's, shared and frozen.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lkspec.drafts.layers import RMSNorm, TrainingTimeTest, linear, shifted
from lkspec.nn.attention import CausalMask, Own, Unrolled
from lkspec.nn.kv_cache import PositionCache
from lkspec.types import LinearHead, TargetSpec, TargetStates
from lkspec.vocab import DraftVocab

# Families whose checkpoints carry such a module; engines serve it.
_WITH_MODULE = ("deepseek_v3", "qwen3_next")


class MTP(TrainingTimeTest):
    """The MTP module of a target.

    A target whose checkpoints carry such a module (DeepSeek-V3, Qwen3-Next) gives its weights (``draft=mtp_native``);
    for any other the module is built from the class of the target's decoder layer.

    Args:
        spec: the target's dimensions, embedding, head and decoder layer.
        vocab: the draft vocabulary, usually the full one.
        num_depths: depths K of the training.
        layer_init: ``target`` starts from a copy of the target's last layer that reads the sum of both inputs;
            ``random`` draws layer and projection.

    Raises:
        ValueError: num_depths < 1 or an unknown layer_init.
    """

    full_vocabulary = True
    title = "MTP"
    paper = "DeepSeek-AI 2024, arXiv:2412.19437"
    head_weight: Tensor
    head_bias: Tensor | None

    def __init__(
        self,
        spec: TargetSpec,
        vocab: DraftVocab,
        *,
        num_depths: int = 6,
        layer_init: str = "random",
        paper_eta: float = 3.0,
    ) -> None:
        super().__init__(vocab, num_depths, paper_eta=paper_eta)
        if layer_init not in ("target", "random"):
            raise ValueError(f"draft.layer_init: expected 'target' or 'random', got {layer_init!r}")
        size, eps = spec.dims.hidden_size, spec.dims.rms_norm_eps
        self.served_by = (
            "vLLM and SGLang, inside the target's own checkpoint"
            if spec.model_type in _WITH_MODULE
            else "research only: no engine serves an MTP module for a target of this kind"
        )
        self.zero_first_embedding = spec.model_type == "deepseek_v3"  # as engines do
        self.enorm, self.hnorm, self.norm = (RMSNorm(size, eps=eps) for _ in range(3))
        self.eh_proj = linear(2 * size, size)
        self.layer = spec.new_layer(layer_init == "target")
        self.window: int | None = self.layer.window  # type: ignore[assignment]  # how many positions a query sees
        if layer_init == "target":
            nn.init.eye_(self.eh_proj.weight[:, :size])
            nn.init.eye_(self.eh_proj.weight[:, size:])
        # Logits of about unit variance at the start, as in EAGLE-3; the next depth normalises what it reads.
        nn.init.constant_(
            self.norm.weight, 1.0 / (spec.head.scale * float(spec.head.weight.float().norm(dim=1).mean()))
        )
        self.register_buffer("embedding", spec.embedding, persistent=False)
        self._share_head(spec.head)

    def _share_head(self, head: LinearHead) -> None:
        """The target's head, its rows outside the draft vocabulary left out."""
        ids = self.vocab.ids.to(head.weight.device)
        whole = self.vocab.is_full
        self.register_buffer("head_weight", head.weight if whole else head.weight[ids], persistent=False)
        bias = head.bias if whole or head.bias is None else head.bias[ids]
        self.register_buffer("head_bias", bias, persistent=False)
        self._head_scale, self._head_soft_cap = head.scale, head.soft_cap

    def frozen_tensors(self) -> list[Tensor]:
        return [tensor for tensor in (self.embedding, self.head_weight, self.head_bias) if tensor is not None]

    def head(self, depth: int) -> LinearHead:
        return LinearHead(self.head_weight, self.head_bias, self._head_scale, self._head_soft_cap)

    def first(self, states: TargetStates) -> Float[Tensor, "B T H"]:
        return states.last.to(self.eh_proj.weight.dtype)

    def of_text(self, tokens: Int[Tensor, "B T"], num_depths: int) -> Callable[[int], Int[Tensor, "B T"]]:
        return partial(shifted, tokens)

    def depth(
        self,
        hidden: Float[Tensor, "B T H"],
        text: Int[Tensor, "B T"],
        positions: Int[Tensor, "B T"],
        mask: CausalMask,
        entries: Own,
    ) -> tuple[Float[Tensor, "B T H"], Float[Tensor, "B T H"], tuple[Tensor, Tensor]]:
        unrolled = Unrolled(mask, entries)
        hidden = self.compiled(self._step)(text, hidden, positions, unrolled, unrolled)
        return hidden, hidden, unrolled.entries[-1]

    def cached_step(
        self, cache: PositionCache, tokens: Int[Tensor, "B S"], hidden: Float[Tensor, "B S H"], positions: Tensor
    ) -> Float[Tensor, "B S H"]:
        cache.at(positions)
        return self._step(tokens, hidden, positions, cache.mask(self.window), cache)

    def _step(
        self,
        tokens: Int[Tensor, "B S"],
        hidden: Float[Tensor, "B S H"],
        positions: Int[Tensor, "B S"],
        mask: Bool[Tensor, "B 1 S L"] | Unrolled,
        cache: PositionCache | Unrolled,
    ) -> Float[Tensor, "B S H"]:
        embedded = nn.functional.embedding(tokens, self.embedding).to(hidden.dtype)
        if self.zero_first_embedding:
            embedded = embedded.masked_fill((positions == 0)[..., None], 0.0)
        fused = self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(hidden)], dim=-1))
        return self.norm(self.layer(fused, positions, mask, cache))
