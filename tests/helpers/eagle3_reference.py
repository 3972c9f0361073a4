"""EAGLE-3 anchor by anchor, in float64, from the checkpoint's tensor names and the format's description alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from helpers.draft_cases import random_batch
from torch import Tensor

from lkspec.drafts.eagle3 import Eagle3
from lkspec.types import Batch, DecoderDims, LinearHead, TargetSpec, TargetStates
from lkspec.vocab import DraftVocab

V = 30
DIMS = DecoderDims(
    hidden_size=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,  # not hidden_size / num_heads
    ffn_size=20,
    rms_norm_eps=1e-3,
    max_positions=64,
    inv_freq=100.0 ** (-torch.arange(3) / 3),
    rope_attention_factor=1.3,
    rope_parameters={},
)
SOME = DraftVocab(torch.arange(0, V, 4), V)


def make_spec(*, bias: bool = False, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> TargetSpec:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    return TargetSpec(
        dims=DIMS,
        embedding=draw(V, 16),
        head=LinearHead(weight=draw(V, 16), bias=draw(V) if bias else None, scale=scale),
        num_aux=3,
        model_type="llama",
        new_layer=lambda copied: torch.nn.Identity(),
    )


def make_draft(vocab: DraftVocab | None = None, *, seed: int = 0, **options) -> Eagle3:
    """A draft whose every parameter, norms too, is far from its initial value."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        draft = Eagle3(make_spec(), vocab or DraftVocab.full(V), **{"num_depths": 3, **options})
        with torch.no_grad():
            for parameter in draft.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return draft


def make_batch(rows: list[list[int]], *, seed: int = 0) -> tuple[Batch, TargetStates]:
    """A random batch of the sizes above."""
    return random_batch(rows, vocab_size=V, aux_size=48, last_size=16, seed=seed)


@dataclass
class Reference:
    """The draft's own weights, run by loops over anchors and heads."""

    draft: Eagle3
    dims: DecoderDims = DIMS
    norm_before_residual: bool = False

    def __post_init__(self) -> None:
        self.weights = {name: tensor.double() for name, tensor in self.draft.state_dict().items()}

    def unroll(self, embedding: Tensor, tokens: Tensor, aux: Tensor, num_depths: int) -> Tensor:
        """Hidden states [K, T, H] of one conversation; NaN where x_{t+k} is not there."""
        num_slots = len(tokens)
        embedding, aux = embedding.double(), aux.double()
        out = torch.full((num_depths, num_slots, self.dims.hidden_size), torch.nan, dtype=torch.float64)
        first = [
            self._entry(embedding[tokens[t + 1]], self.weights["fc.weight"] @ aux[t], t) for t in range(num_slots - 1)
        ]
        for t in range(num_slots - 1):
            h, own = self.weights["fc.weight"] @ aux[t], []
            for k in range(1, num_depths + 1):
                if t + k >= num_slots:
                    break
                query, key, value = self._entry(embedding[tokens[t + k]], h, t + k - 1)
                if k > 1:
                    own.append((key, value))
                h = self._finish(h, self._mix(query, [(e[1], e[2]) for e in first[: t + 1]] + own))
                out[k - 1, t] = self._norm(h, "norm")
        return out

    def _entry(self, embedded: Tensor, h: Tensor, position: int) -> tuple[Tensor, Tensor, Tensor]:
        fused = torch.cat([self._norm(embedded, "midlayer.input_layernorm"), self._norm(h, "midlayer.hidden_norm")])
        q, k, v = (
            (self.weights[f"midlayer.self_attn.{name}_proj.weight"] @ fused).reshape(-1, self.dims.head_dim)
            for name in "qkv"
        )
        return self._rotated(q, position), self._rotated(k, position), v

    def _rotated(self, heads: Tensor, position: int) -> Tensor:
        """Dimension i and i + half as the complex number that turns by position * inv_freq_i."""
        half = self.dims.head_dim // 2
        turned = torch.complex(heads[:, :half], heads[:, half:]) * torch.polar(
            torch.full((half,), self.dims.rope_attention_factor, dtype=torch.float64),
            position * self.dims.inv_freq.double(),
        )
        return torch.cat([turned.real, turned.imag], dim=1)

    def _mix(self, query: Tensor, entries: list[tuple[Tensor, Tensor]]) -> Tensor:
        group = self.dims.num_heads // self.dims.num_kv_heads
        mixed = []
        for head in range(self.dims.num_heads):
            scores = torch.stack([query[head] @ key[head // group] for key, _ in entries])
            weights = (scores / math.sqrt(self.dims.head_dim)).softmax(0)
            mixed.append(sum(w * value[head // group] for w, (_, value) in zip(weights, entries, strict=True)))
        return torch.cat(mixed)

    def _finish(self, h: Tensor, mixed: Tensor) -> Tensor:
        residual = self._norm(h, "midlayer.hidden_norm") if self.norm_before_residual else h
        h = residual + self.weights["midlayer.self_attn.o_proj.weight"] @ mixed
        normed = self._norm(h, "midlayer.post_attention_layernorm")
        gate = self.weights["midlayer.mlp.gate_proj.weight"] @ normed
        up = self.weights["midlayer.mlp.up_proj.weight"] @ normed
        return h + self.weights["midlayer.mlp.down_proj.weight"] @ (gate * torch.sigmoid(gate) * up)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return x / torch.sqrt((x * x).mean() + self.dims.rms_norm_eps) * self.weights[f"{name}.weight"]
