"""The MLP speculator (Wertheimer et al. 2024, arXiv 2404.19124): a recurrent state that reads one more token a depth.

s_0 = the target's last hidden state at the anchor; at depth k = 1..K, with x_{t+k} the text's (or the drafted) token::

    s_k = GELU(ln_k(proj_k(s_{k-1}) + (emb_weight / state_weight) * emb_k(x_{t+k}))),   logits = head_k(s_k)
    state_weight = 0.5^(0.5 / K),   emb_weight = sqrt((1 - state_weight^2) * D / 2)
    ln_k(x) = x / sqrt(mean(x^2) + eps) * weight_k + bias_k

so that s_0 makes up half of the last state's magnitude. ln is called a LayerNorm in every implementation, but none of
them (fms-extras, TGI, vLLM) takes the mean away.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lkspec.drafts.base import Draft
from lkspec.drafts.layers import init_head, shifted
from lkspec.nn.kv_cache import PositionCache
from lkspec.types import Batch, DraftSampler, FreshStates, LinearHead, TargetSpec, TargetStates
from lkspec.vocab import DraftVocab

_EPS = 1e-6
_EMBEDDINGS = ("learned", "target")


class MLPSpeculator(Draft):
    """The MLP speculator of a target.

    Args:
        spec: the target's dimensions, embedding and head.
        vocab: the draft vocabulary.
        num_depths: depths K.
        inner_dim: width D of the state; the target's hidden size unless given.
        embeddings: ``learned`` tables [V, D] of each depth's own, or ``target``: the target's table, frozen, shared by
            all depths and scaled as a learned one starts (standard deviation 1 / sqrt(D)).
        tie_weights: one embedding, ln and head for all depths, one projection for all but the first.
        scale_input: s_0 = ln(h) / sqrt(2), without parameters, instead of h.
        head_init: ``random``, or ``target``, the target's rows.

    Raises:
        ValueError: num_depths or inner_dim < 1, an unknown choice, or ``target`` with an inner_dim that is not the
            target's hidden size.
    """

    title = "MLP speculator"
    paper = "Wertheimer et al. 2024, arXiv:2404.19124"
    target_embedding: Tensor

    def __init__(
        self,
        spec: TargetSpec,
        vocab: DraftVocab,
        *,
        num_depths: int = 6,
        inner_dim: int | None = None,
        embeddings: str = "target",
        tie_weights: bool = False,
        scale_input: bool = False,
        head_init: str = "random",
        paper_eta: float = 3.0,
    ) -> None:
        super().__init__(vocab, num_depths, max_depths=num_depths, paper_eta=paper_eta)
        hidden_size = spec.dims.hidden_size
        inner_dim = hidden_size if inner_dim is None else inner_dim
        _check(inner_dim, embeddings, hidden_size)
        self.served_by = (
            "fms-extras and TGI (mlp_speculator); current vLLM and SGLang no longer serve it"
            if vocab.is_full
            else "research only: the mlp_speculator format has no draft vocabulary "
            "(vocab.size=null has fms-extras, TGI)"
        )
        self.inner_dim, self.tie_weights, self.scale_input = inner_dim, tie_weights, scale_input
        self.state_weight = 0.5 ** (0.5 / num_depths)
        self.emb_weight = math.sqrt((1 - self.state_weight**2) * inner_dim / 2)
        num_own = 1 if tie_weights else num_depths
        num_proj = min(2, num_depths) if tie_weights else num_depths
        std = inner_dim**-0.5
        self.proj = nn.ModuleList(
            nn.Linear(hidden_size if depth == 0 else inner_dim, inner_dim, bias=False) for depth in range(num_proj)
        )
        self.ln = nn.ModuleList(_Norm(inner_dim) for _ in range(num_own))
        self.heads = nn.ModuleList(nn.Linear(inner_dim, vocab.size, bias=False) for _ in range(num_own))
        self.emb = nn.ModuleList()
        if embeddings == "learned":
            self.emb.extend(nn.Embedding(vocab.target_size, inner_dim) for _ in range(num_own))
        for weight in (*self.proj.parameters(), *self.emb.parameters()):
            nn.init.normal_(weight, std=std)
        for weight in self.heads.parameters():
            init_head(weight, spec, vocab, head_init, std=std)
        if not self.emb:
            self.register_buffer("target_embedding", spec.embedding, persistent=False)
            self.embedding_scale = std / float(spec.embedding.float().std())

    def frozen_tensors(self) -> list[Tensor]:
        return [] if self.emb else [self.target_embedding]

    def head(self, depth: int) -> LinearHead:
        return LinearHead(weight=_of_depth(self.heads, depth).get_parameter("weight"))

    def unroll(self, batch: Batch, states: TargetStates, num_depths: int | None = None) -> Float[Tensor, "K B T D"]:
        num_depths = num_depths or self.num_depths
        self.check_num_draft_tokens(num_depths)
        state = self._first_state(states.last)
        step = self.checkpointed(self.compiled(self._next_state))
        outputs = []
        for depth in range(1, num_depths + 1):
            state = step(state, shifted(batch.tokens, depth), depth)
            outputs.append(state)
        return torch.stack(outputs)

    def observe(self, cache: PositionCache, fresh: FreshStates) -> Float[Tensor, "B S H"]:
        return self._first_state(fresh.states.last)

    def propose(
        self, cache: PositionCache, fresh: FreshStates, sample: DraftSampler, num_draft_tokens: int
    ) -> Int[Tensor, "B K"]:
        state, read = fresh.at_anchor(self.observe(cache, fresh)), fresh.at_anchor(fresh.next_tokens)
        tokens: list[Tensor] = []
        for depth in range(1, num_draft_tokens + 1):
            state = self._next_state(state, read, depth)
            read = self.vocab.to_target(sample(self.head(depth).logits(state)))
            tokens.append(read)
        return torch.stack(tokens, dim=1)

    def _first_state(self, last: Float[Tensor, "*B H"]) -> Float[Tensor, "*B H"]:
        last = last.to(self.head(1).weight.dtype)
        if not self.scale_input:
            return last
        return nn.functional.rms_norm(last, last.shape[-1:], eps=_EPS) / math.sqrt(2)

    def _next_state(self, state: Float[Tensor, "*B H"], tokens: Int[Tensor, "*B"], depth: int) -> Float[Tensor, "*B D"]:
        projected = _of_depth(self.proj, depth)(state)
        mixed = torch.add(projected, self._embed(tokens, depth), alpha=self.emb_weight / self.state_weight)
        return nn.functional.gelu(_of_depth(self.ln, depth)(mixed))

    def _embed(self, tokens: Int[Tensor, "*B"], depth: int) -> Float[Tensor, "*B D"]:
        if self.emb:
            return _of_depth(self.emb, depth)(tokens)
        rows = nn.functional.embedding(tokens, self.target_embedding)
        return rows.to(self.head(1).weight.dtype) * self.embedding_scale


class _Norm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight + bias."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, state: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        return nn.functional.rms_norm(state, state.shape[-1:], eps=_EPS) * self.weight + self.bias


def _of_depth(modules: nn.ModuleList, depth: int) -> nn.Module:
    """The module of a depth; tied ones are stored once."""
    return modules[min(depth, len(modules)) - 1]


def _check(inner_dim: int, embeddings: str, hidden_size: int) -> None:
    if inner_dim < 1:
        raise ValueError(f"draft.inner_dim: expected at least 1, got {inner_dim}")
    if embeddings not in _EMBEDDINGS:
        raise ValueError(f"draft.embeddings: expected one of {', '.join(_EMBEDDINGS)}, got {embeddings!r}")
    if embeddings == "target" and inner_dim != hidden_size:
        raise ValueError(
            f"draft.embeddings=target has the target's width {hidden_size}, but draft.inner_dim is {inner_dim}; "
            "leave inner_dim out or set draft.embeddings=learned"
        )
