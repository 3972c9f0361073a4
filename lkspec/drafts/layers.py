"""The parts of a plain Llama decoder layer that drafts are made of."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

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


def attend(
    queries: Float[Tensor, "B N S E"],
    keys: Float[Tensor, "B M L E"],
    values: Float[Tensor, "B M L E"],
    mask: Bool[Tensor, "B 1 S L"],
    own: tuple[tuple[Float[Tensor, "B M S E"], Float[Tensor, "B M S E"]], ...] = (),
) -> Float[Tensor, "B N S E"]:
    """Grouped-query attention to masked keys and, besides, of each query to one key of its own per entry of ``own``.

    softmax over [q K^T | q k_own_1 | ...] / sqrt(E): the entries of ``own`` are a diagonal (slot s of a query only
    meets slot s of an own key), so a depth of the training-time test costs S, not S^2, more scores.
    """
    num_rows, num_heads, num_queries, head_dim = queries.shape
    groups = num_heads // keys.shape[1]
    grouped = queries.reshape(num_rows, keys.shape[1], groups, num_queries, head_dim)
    scores = grouped @ keys[:, :, None].transpose(-1, -2)
    scores = scores.float().masked_fill(~mask[:, :, None], -torch.inf)
    diagonal = [(grouped * key[:, :, None]).sum(-1, keepdim=True).float() for key, _ in own]
    weights = torch.softmax(torch.cat([scores, *diagonal], dim=-1) * head_dim**-0.5, dim=-1).to(values.dtype)
    num_keys = keys.shape[2]
    mixed = weights[..., :num_keys] @ values[:, :, None]
    for index, (_, value) in enumerate(own):
        mixed = mixed + weights[..., num_keys + index, None] * value[:, :, None]
    return mixed.reshape(num_rows, num_heads, num_queries, head_dim)
