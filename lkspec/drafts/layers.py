"""What several drafts are made of: parts of a plain Llama decoder layer, heads, and what an anchor reads."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lkspec.types import Batch, TargetSpec
from lkspec.vocab import DraftVocab

INIT_STD = 0.02


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


class Rope(nn.Module):
    """Rotary position embedding with the target's frequencies; halves are rotated, as transformers does.

    Frequencies and angles stay in float32 whatever the autocast type.
    """

    inv_freq: Tensor

    def __init__(self, inv_freq: Float[Tensor, " half"], attention_factor: float) -> None:
        super().__init__()
        self.register_buffer("inv_freq", inv_freq.float().clone(), persistent=False)
        self.attention_factor = attention_factor

    def forward(self, heads: Float[Tensor, "B N S E"], positions: Int[Tensor, "B S"]) -> Float[Tensor, "B N S E"]:
        angles = positions[:, None, :, None].float() * self.inv_freq
        cos = (angles.cos() * self.attention_factor).repeat(1, 1, 1, 2).to(heads.dtype)
        sin = (angles.sin() * self.attention_factor).repeat(1, 1, 1, 2).to(heads.dtype)
        first, second = heads.chunk(2, dim=-1)
        return heads * cos + torch.cat((-second, first), dim=-1) * sin


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


def visible_anchors(batch: Batch) -> Bool[Tensor, "B 1 T T"]:
    """Anchors of the same conversation, not later than the query's."""
    same = batch.segments[:, :, None] == batch.segments[:, None, :]
    slots = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)
    return (same & (slots[:, None] >= slots[None, :]))[:, None]


def shifted(tokens: Int[Tensor, "B T"], offset: int) -> Int[Tensor, "B T"]:
    """x_{t + offset} at slot t; past the row's end, where no anchor is supervised, token 0."""
    moved = torch.zeros_like(tokens)
    if offset < tokens.shape[1]:
        moved[:, :-offset] = tokens[:, offset:]
    return moved
