"""What several drafts are made of: parts of a plain Llama decoder layer, heads, and what an anchor reads."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lkspec.drafts.base import Draft, UnrollOptions
from lkspec.nn.attention import CausalMask, Own
from lkspec.nn.kv_cache import PositionCache
from lkspec.types import Batch, DraftSampler, FreshStates, TargetSpec, TargetStates
from lkspec.vocab import DraftVocab

INIT_STD = 0.02

Rotation = tuple[Float[Tensor, "B 1 S half"], Float[Tensor, "B 1 S half"]]  # cosine and sine of each angle


def linear(num_in: int, num_out: int) -> nn.Linear:
    """A projection without bias, initialised as Llama's are."""
    layer = nn.Linear(num_in, num_out, bias=False)
    nn.init.normal_(layer.weight, std=INIT_STD)
    return layer


class GatedMLP(nn.Module):
    """down(SiLU(gate x) * up x)."""

    def __init__(self, hidden_size: int, ffn_size: int) -> None:
        super().__init__()
        self.gate_proj = linear(hidden_size, ffn_size)
        self.up_proj = linear(hidden_size, ffn_size)
        self.down_proj = linear(ffn_size, hidden_size)

    def forward(self, hidden: Float[Tensor, "... H"]) -> Float[Tensor, "... H"]:
        return self.down_proj(nn.functional.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


class RMSNorm(nn.RMSNorm):
    """``nn.RMSNorm``, which torch computes in one piece on GPUs; elsewhere it would keep two more tensors an input."""

    def forward(self, hidden: Float[Tensor, "... H"]) -> Float[Tensor, "... H"]:
        if hidden.is_cuda:
            return super().forward(hidden)
        return _Normalised.apply(hidden, self.weight, self.eps)


class _Normalised(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) * weight, in at least float32; keeps x and the root's inverse for backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Float[Tensor, "... H"], weight: Float[Tensor, " H"], eps: float) -> Tensor:
        exact = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        inverse = (exact.square().mean(-1, keepdim=True) + eps).rsqrt()
        ctx.save_for_backward(hidden, weight, inverse)
        return (exact * inverse).mul_(weight).to(hidden.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Float[Tensor, "... H"]) -> tuple[Tensor | None, ...]:
        hidden, weight, inverse = ctx.saved_tensors
        normalised = hidden * inverse
        along = normalised * gradient
        d_weight = along.flatten(0, -2).sum(0).to(weight.dtype)
        if not ctx.needs_input_grad[0]:
            return None, d_weight, None
        common = (along @ weight.to(along.dtype))[..., None] / weight.numel()
        d_hidden = (gradient * weight).addcmul_(normalised, common, value=-1).mul_(inverse)
        return d_hidden.to(hidden.dtype), d_weight, None


class GatedDown(torch.autograd.Function):
    """down(SiLU(gate) * up), which keeps nothing but gate and up for backward."""

    @staticmethod
    def forward(ctx: Any, gate_up: Float[Tensor, "... FF"], down: Float[Tensor, "H F"]) -> Float[Tensor, "... H"]:
        ctx.save_for_backward(gate_up, down)
        gate, up = gate_up.chunk(2, dim=-1)
        return nn.functional.linear(nn.functional.silu(gate) * up, down)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Float[Tensor, "... H"]) -> tuple[Tensor, Tensor]:
        gate_up, down = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        active = nn.functional.silu(gate)
        d_down = gradient.flatten(0, -2).T @ (active * up).flatten(0, -2)
        d_product = gradient @ down
        d_gate = torch.ops.aten.silu_backward(d_product * up, gate)
        return torch.cat([d_gate, d_product * active], dim=-1), d_down


def as_multiplied(weight: Tensor) -> Tensor:
    """The weight in autocast's type: what is used at several depths is converted, and kept for backward, once."""
    kind = weight.device.type
    return weight.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else weight


class Rope(nn.Module):
    """Rotary position embedding with the target's frequencies; halves are rotated, as transformers does.

    Frequencies and angles stay in float32 whatever the autocast type. ``at`` gives the rotation of positions, which
    queries and keys share.
    """

    inv_freq: Tensor

    def __init__(self, inv_freq: Float[Tensor, " half"], attention_factor: float) -> None:
        super().__init__()
        self.register_buffer("inv_freq", inv_freq.float().clone(), persistent=False)
        self.attention_factor = attention_factor

    def forward(self, positions: Int[Tensor, "B S"], dtype: torch.dtype) -> Rotation:
        """The rotation of these positions, for heads of a type."""
        angles = positions[:, None, :, None].float() * self.inv_freq
        return (angles.cos() * self.attention_factor).to(dtype), (angles.sin() * self.attention_factor).to(dtype)


def rotate(heads: Float[Tensor, "B N S E"], rotation: Rotation) -> Float[Tensor, "B N S E"]:
    """Dimensions i and i + E/2 turned by their angle."""
    cos, sin = rotation
    first, second = heads.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


@torch.no_grad()
def init_head(weight: Float[Tensor, "D H"], spec: TargetSpec, vocab: DraftVocab, how: str, *, std: float) -> None:
    """Fills a head: ``target`` takes the target's rows (times the scale of its head), ``random`` draws N(0, std^2).

    Raises:
        ValueError: an unknown way, or ``target`` where the target's head has a bias or another width.
    """
    if how == "random":
        nn.init.normal_(weight, std=std)
        return
    if how != "target":
        raise ValueError(f"draft.head_init: expected 'target' or 'random', got {how!r}")
    head = spec.head
    if head.bias is not None:
        raise ValueError("draft.head_init=target: the target's head has a bias, which a draft's head has not")
    if head.weight.shape[1] != weight.shape[1]:
        raise ValueError(
            f"draft.head_init=target: the target's head reads {head.weight.shape[1]} features, this draft's "
            f"{weight.shape[1]}; make them equal or set draft.head_init=random"
        )
    weight.copy_(head.weight[vocab.ids.to(head.weight.device)] * head.scale)


def visible_anchors(batch: Batch, options: UnrollOptions, window: int | None = None) -> CausalMask:
    """Anchors of the same conversation, not later than the query's."""
    return CausalMask.of(batch.segments, as_made=batch.as_made.segments, window=window, kernel=options.attention)


def shifted(tokens: Int[Tensor, "B T"], offset: int) -> Int[Tensor, "B T"]:
    """x_{t + offset} at slot t; past the row's end, where no anchor is supervised, token 0."""
    moved = torch.zeros_like(tokens)
    if offset < tokens.shape[1]:
        moved[:, :-offset] = tokens[:, offset:]
    return moved


class TrainingTimeTest(Draft):
    """A draft of one decoder layer that reads x_{t+k} and, at depth k >= 2, its own output of depth k - 1.

    Keys: depth 1 of all anchors <= t, then this anchor's own depths 2..k; RoPE position t + k - 1.

    Attributes:
        embedding: the target's, shared and frozen.
        window: how many positions a query sees; None for all.
    """

    embedding: Tensor
    window: int | None = None

    @abstractmethod
    def first(self, states: TargetStates) -> Float[Tensor, "B T H"]:
        """What depth 1 reads beside its token."""

    @abstractmethod
    def of_text(self, tokens: Int[Tensor, "B T"], num_depths: int) -> Callable[[int], Any]:
        """What ``depth`` reads of x_{t+k}, from k."""

    @abstractmethod
    def depth(
        self, hidden: Float[Tensor, "B T H"], text: Any, positions: Int[Tensor, "B T"], mask: CausalMask, entries: Own
    ) -> tuple[Float[Tensor, "B T H"], Float[Tensor, "B T H"], tuple[Tensor, Tensor]]:
        """What the next depth reads, what the head does, and keys and values for later depths."""

    @abstractmethod
    def cached_step(
        self, cache: PositionCache, tokens: Int[Tensor, "B S"], hidden: Float[Tensor, "B S H"], positions: Tensor
    ) -> Float[Tensor, "B S H"]:
        """What the next depth reads, in decoding."""

    def before_head(self, hidden: Float[Tensor, "B H"]) -> Float[Tensor, "B H"]:
        """What the head reads, from what the next depth does."""
        return hidden

    def unroll(self, batch: Batch, states: TargetStates, num_depths: int | None = None) -> Float[Tensor, "K B T H"]:
        num_depths = num_depths or self.num_depths
        hidden, of_text = self.first(states), self.of_text(batch.tokens, num_depths)
        visible = visible_anchors(batch, self.unroll_options, self.window)
        step = self.checkpointed(self.depth)
        entries: Own = ()
        outputs = []
        for depth in range(1, num_depths + 1):
            mask, positions = replace(visible, ahead=depth - 1), batch.positions + depth - 1
            hidden, output, entry = step(hidden, of_text(depth), positions, mask, entries)
            entries = (*entries, entry)
            outputs.append(output)
        return torch.stack(outputs)

    def observe(self, cache: PositionCache, fresh: FreshStates) -> Float[Tensor, "B S H"]:
        return self.cached_step(cache, fresh.next_tokens, self.first(fresh.states), fresh.positions)

    def propose(
        self, cache: PositionCache, fresh: FreshStates, sample: DraftSampler, num_draft_tokens: int
    ) -> Int[Tensor, "B K"]:
        hidden = fresh.at_anchor(self.observe(cache, fresh))[:, None]
        anchors = fresh.at_anchor(fresh.positions)[:, None]
        tokens: list[Tensor] = []
        for depth in range(1, num_draft_tokens + 1):
            if depth > 1:
                hidden = self.cached_step(cache, tokens[-1][:, None], hidden, anchors + depth - 1)
            logits = self.head(depth).logits(self.before_head(hidden[:, 0]))
            tokens.append(self.vocab.to_target(sample(logits)))
        return torch.stack(tokens, dim=1)

    def frozen_tensors(self) -> list[Tensor]:
        return [self.embedding]
