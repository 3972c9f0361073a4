"""MTP modules anchor by anchor and head by head, in float64, from released tensor names and the papers' formulas."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from helpers.mtp_checkpoints import Checkpoint
from torch import Tensor

Entry = tuple[Tensor, Tensor]


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def turned(x: Tensor, y: Tensor, angles: Tensor, factor: float) -> Tensor:
    """The complex numbers x + iy, each turned by its angle: real parts, then imaginary ones."""
    rotated = torch.complex(x, y) * torch.polar(torch.full_like(angles, factor), angles)
    return torch.cat([rotated.real, rotated.imag])


class Reference(ABC):
    """A module's weights, run by loops.

    Args:
        checkpoint: whose module.
        feed_normalised: whether the next depth reads norm(layer(u)), as it should, or layer(u).
    """

    names: dict[str, str]
    norm_offset: float
    zero_first: bool

    def __init__(self, checkpoint: Checkpoint, *, feed_normalised: bool = True) -> None:
        self.weights, self.config = checkpoint.weights(), checkpoint.config
        self.embedding = checkpoint.model.get_input_embeddings().weight.detach().double()
        self.feed_normalised = feed_normalised

    def unroll(self, tokens: Tensor, last: Tensor, num_depths: int) -> Tensor:
        """Hidden states [K, T, H] of one conversation from position 0; NaN where x_{t+k} is not there."""
        num_slots = len(tokens)
        last = last.double()
        out = torch.full((num_depths, *last.shape), torch.nan, dtype=torch.float64)
        first = [self.entry(self.fused(tokens[t + 1], last[t], t), t) for t in range(num_slots - 1)]
        for t in range(num_slots - 1):
            m, own = last[t], []
            for k in range(1, num_depths + 1):
                if t + k >= num_slots:
                    break
                u, position = self.fused(tokens[t + k], m, t + k - 1), t + k - 1
                if k > 1:
                    own.append(self.entry(u, position))
                x = u + self.attention(u, position, [*first[: t + 1], *own])
                x = x + self.experts(self.norm(x, self.names["layer"] + "post_attention_layernorm"))
                out[k - 1, t] = self.norm(x, self.names["norm"])
                m = out[k - 1, t] if self.feed_normalised else x
        return out

    def fused(self, token: Tensor, m: Tensor, position: int) -> Tensor:
        """What the layer reads."""
        embedded = self.embedding[token] * (0.0 if self.zero_first and position == 0 else 1.0)
        pair = [self.norm(embedded, self.names["enorm"]), self.norm(m, self.names["hnorm"])]
        return self.weights[self.names["fc"] + ".weight"] @ torch.cat(pair)

    def norm(self, x: Tensor, name: str, eps: float | None = None) -> Tensor:
        scale = self.weights[f"{name}.weight"] + self.norm_offset
        return x / torch.sqrt((x * x).mean() + (self.config.rms_norm_eps if eps is None else eps)) * scale

    def of_layer(self, name: str) -> Tensor:
        return self.weights[f"{self.names['layer']}{name}.weight"]

    def normed_input(self, u: Tensor) -> Tensor:
        return self.norm(u, self.names["layer"] + "input_layernorm")

    def mlp(self, x: Tensor, name: str) -> Tensor:
        inner = silu(self.of_layer(f"{name}.gate_proj") @ x) * (self.of_layer(f"{name}.up_proj") @ x)
        return self.of_layer(f"{name}.down_proj") @ inner

    @abstractmethod
    def entry(self, u: Tensor, position: int) -> Entry:
        """What later queries see of this one."""

    @abstractmethod
    def attention(self, u: Tensor, position: int, entries: list[Entry]) -> Tensor:
        """The attention block's output."""

    @abstractmethod
    def experts(self, x: Tensor) -> Tensor:
        """The mixture of experts."""


class DeepSeekReference(Reference):
    """DeepSeek-V2 (arXiv 2405.04434) section 2.1, in the absorbed form; V3 (arXiv 2412.19437) section 2.1.2."""

    names = {  # noqa: RUF012
        "enorm": "enorm",
        "hnorm": "hnorm",
        "fc": "eh_proj",
        "norm": "shared_head.norm",
        "layer": "",
    }
    norm_offset = 0.0
    zero_first = True
    latent_eps = 1e-6  # transformers gives the latents' norms their default; released models have it everywhere

    def entry(self, u: Tensor, position: int) -> Entry:
        """The latent that keys and values are expanded from, and the key's part that RoPE turns."""
        both = self.of_layer("self_attn.kv_a_proj_with_mqa") @ self.normed_input(u)
        latent, key = both[: self.config.kv_lora_rank], both[self.config.kv_lora_rank :]
        return self.norm(latent, "self_attn.kv_a_layernorm", self.latent_eps), self.rotated(key, position)

    def attention(self, u: Tensor, position: int, entries: list[Entry]) -> Tensor:
        c, x = self.config, self.normed_input(u)
        if c.q_lora_rank is None:
            queries = self.of_layer("self_attn.q_proj") @ x
        else:
            compressed = self.norm(self.of_layer("self_attn.q_a_proj") @ x, "self_attn.q_a_layernorm", self.latent_eps)
            queries = self.of_layer("self_attn.q_b_proj") @ compressed
        up = self.of_layer("self_attn.kv_b_proj").reshape(c.num_attention_heads, -1, c.kv_lora_rank)
        mixed = []
        for query, expand in zip(queries.reshape(c.num_attention_heads, -1), up, strict=True):
            expand_key, expand_value = expand[: c.qk_nope_head_dim], expand[c.qk_nope_head_dim :]
            absorbed = expand_key.T @ query[: c.qk_nope_head_dim]
            rope = self.rotated(query[c.qk_nope_head_dim :], position)
            scores = torch.stack([absorbed @ latent + rope @ key for latent, key in entries])
            weights = (scores * self.scaling()).softmax(0)
            latents = torch.stack([latent for latent, _ in entries])
            mixed.append(expand_value @ torch.einsum("l,lr->r", weights, latents))
        return self.of_layer("self_attn.o_proj") @ torch.cat(mixed)

    def experts(self, x: Tensor) -> Tensor:
        c = self.config
        affinity = torch.sigmoid(self.of_layer("mlp.gate") @ x)
        corrected = (affinity + self.weights["mlp.gate.e_score_correction_bias"]).tolist()
        size = c.n_routed_experts // c.n_group
        groups = [list(range(g * size, (g + 1) * size)) for g in range(c.n_group)]
        groups.sort(key=lambda group: -sum(sorted((corrected[e] for e in group), reverse=True)[:2]))
        allowed = [expert for group in groups[: c.topk_group] for expert in group]
        chosen = sorted(allowed, key=lambda expert: -corrected[expert])[: c.num_experts_per_tok]
        total = sum(affinity[expert] for expert in chosen)
        out = self.mlp(x, "mlp.shared_experts")
        for expert in chosen:
            out = out + c.routed_scaling_factor * affinity[expert] / total * self.mlp(x, f"mlp.experts.{expert}")
        return out

    def rotated(self, x: Tensor, position: int) -> Tensor:
        """Neighbouring dimensions are a pair."""
        inv_freq, factor = self.frequencies(), 1.0
        if self.config.rope_parameters["rope_type"] == "yarn":
            factor = self.mscale("mscale") / self.mscale("mscale_all_dim")
        return turned(x[0::2], x[1::2], position * inv_freq, factor)

    def frequencies(self) -> Tensor:
        """YaRN (arXiv 2309.00071): fast dimensions stay, slow ones are interpolated, a ramp between."""
        rope, dim = self.config.rope_parameters, self.config.qk_rope_head_dim
        base = rope["rope_theta"]
        inv_freq = torch.tensor([base ** (-2 * i / dim) for i in range(dim // 2)], dtype=torch.float64)
        if rope["rope_type"] == "default":
            return inv_freq

        def dimension(rotations: float) -> float:
            return (
                dim
                * math.log(rope["original_max_position_embeddings"] / (rotations * 2 * math.pi))
                / 2
                / math.log(base)
            )

        low = max(math.floor(dimension(rope["beta_fast"])), 0)
        high = min(math.ceil(dimension(rope["beta_slow"])), dim - 1)
        ramp = torch.tensor([min(max((i - low) / (high - low), 0.0), 1.0) for i in range(dim // 2)])
        return inv_freq / rope["factor"] * ramp + inv_freq * (1 - ramp)

    def mscale(self, key: str) -> float:
        rope = self.config.rope_parameters
        return 0.1 * rope[key] * math.log(rope["factor"]) + 1.0

    def scaling(self) -> float:
        plain = (self.config.qk_nope_head_dim + self.config.qk_rope_head_dim) ** -0.5
        return plain * self.mscale("mscale_all_dim") ** 2 if "factor" in self.config.rope_parameters else plain


class QwenReference(Reference):
    """Qwen3-Next: attention with an output gate, norms of 1 + weight, a gated shared expert."""

    names = {  # noqa: RUF012
        "enorm": "pre_fc_norm_embedding",
        "hnorm": "pre_fc_norm_hidden",
        "fc": "fc",
        "norm": "norm",
        "layer": "layers.0.",
    }
    norm_offset = 1.0
    zero_first = False

    def entry(self, u: Tensor, position: int) -> Entry:
        """Keys and values, a row a head."""
        x = self.normed_input(u)
        keys, values = (
            (self.of_layer(f"self_attn.{name}_proj") @ x).reshape(-1, self.config.head_dim) for name in "kv"
        )
        return torch.stack([self.prepared(key, "k_norm", position) for key in keys]), values

    def attention(self, u: Tensor, position: int, entries: list[Entry]) -> Tensor:
        c, x = self.config, self.normed_input(u)
        pairs = (self.of_layer("self_attn.q_proj") @ x).reshape(c.num_attention_heads, 2, c.head_dim)
        mixed = []
        for head, (query, gate) in enumerate(pairs):
            group = head * c.num_key_value_heads // c.num_attention_heads
            query = self.prepared(query, "q_norm", position)
            scores = torch.stack([query @ keys[group] for keys, _ in entries]) / math.sqrt(c.head_dim)
            weights = scores.softmax(0)
            values = torch.stack([values[group] for _, values in entries])
            mixed.append(torch.einsum("l,le->e", weights, values) / (1 + torch.exp(-gate)))
        return self.of_layer("self_attn.o_proj") @ torch.cat(mixed)

    def prepared(self, head: Tensor, norm: str, position: int) -> Tensor:
        """Normed, then its first dimensions turned: i and i + half are a pair."""
        head = self.norm(head, f"layers.0.self_attn.{norm}")
        num = int(self.config.head_dim * self.config.rope_parameters["partial_rotary_factor"])
        half, base = num // 2, self.config.rope_parameters["rope_theta"]
        angles = torch.tensor([position * base ** (-2 * i / num) for i in range(half)], dtype=torch.float64)
        return torch.cat([turned(head[:half], head[half:num], angles, 1.0), head[num:]])

    def experts(self, x: Tensor) -> Tensor:
        logits = self.of_layer("mlp.gate") @ x
        probs = torch.exp(logits) / torch.exp(logits).sum()
        chosen = sorted(range(len(probs)), key=lambda expert: -float(probs[expert]))[: self.config.num_experts_per_tok]
        total = sum(probs[expert] for expert in chosen)
        gate = 1 / (1 + torch.exp(-(self.of_layer("mlp.shared_expert_gate") @ x)))
        out = gate * self.mlp(x, "mlp.shared_expert")
        for expert in chosen:
            out = out + probs[expert] / total * self.mlp(x, f"mlp.experts.{expert}")
        return out
