"""MEDUSA (Cai et al. 2024, arXiv 2401.10774): K independent heads on the target's last hidden state.

Head k reads only h_t of the anchor: hidden_k = block_kL(... block_k1(h_t)), block(x) = x + SiLU(W x + b),
and proposes x_{t+1+k}. All proposals of a round are independent given h_t. Parameters carry the names that vLLM loads.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lkspec.drafts.base import Draft
from lkspec.drafts.layers import INIT_STD, init_head
from lkspec.nn.kv_cache import PositionCache
from lkspec.types import Batch, DraftSampler, FreshStates, LinearHead, TargetSpec, TargetStates
from lkspec.vocab import DraftVocab


class Medusa(Draft):
    """The MEDUSA draft of a target.

    Args:
        spec: the target's dimensions and head.
        vocab: the draft vocabulary.
        num_depths: heads K.
        num_layers: residual blocks a head; they start at zero, as the identity.
        bias: whether blocks have a bias.
        head_init: ``target`` starts each head from the target's rows (scaled as the target's head is); ``random``.

    Raises:
        ValueError: num_depths or num_layers < 1, an unknown head_init, or ``target`` where the target's has a bias.
    """

    title = "MEDUSA"
    paper = "Cai et al. 2024, arXiv:2401.10774"
    served_by = "vLLM 0.5 to 0.32, drafting by argmax (removed in 0.33); not SGLang"

    def __init__(
        self,
        spec: TargetSpec,
        vocab: DraftVocab,
        *,
        num_depths: int = 6,
        num_layers: int = 1,
        bias: bool = False,
        head_init: str = "target",
        paper_eta: float = 10.0,
    ) -> None:
        super().__init__(vocab, num_depths, max_depths=num_depths, paper_eta=paper_eta)
        if num_layers < 1:
            raise ValueError(f"draft.num_layers: expected at least 1, got {num_layers}")
        self.num_layers, self.bias = num_layers, bias
        size = spec.dims.hidden_size
        self.blocks = nn.ModuleList(_Blocks(size, num_layers, bias=bias) for _ in range(num_depths))
        self.lm_heads = nn.ModuleList(nn.Linear(size, vocab.size, bias=False) for _ in range(num_depths))
        for depth in range(1, num_depths + 1):
            init_head(self.head(depth).weight, spec, vocab, head_init, std=INIT_STD)

    def head(self, depth: int) -> LinearHead:
        return LinearHead(weight=self.lm_heads.get_parameter(f"{depth - 1}.weight"))

    def unroll(self, batch: Batch, states: TargetStates, num_depths: int | None = None) -> Float[Tensor, "K B T H"]:
        return self._all_depths(states.last, num_depths or self.num_depths)

    def observe(self, cache: PositionCache, fresh: FreshStates) -> Float[Tensor, "B S H"]:
        return fresh.states.last

    def propose(
        self, cache: PositionCache, fresh: FreshStates, sample: DraftSampler, num_draft_tokens: int
    ) -> Int[Tensor, "B K"]:
        hidden = self._all_depths(fresh.at_anchor(fresh.states.last), num_draft_tokens)
        drawn = [sample(self.head(depth).logits(hidden[depth - 1])) for depth in range(1, num_draft_tokens + 1)]
        return self.vocab.to_target(torch.stack(drawn, dim=1))

    def _all_depths(self, last: Float[Tensor, "*B H"], num_depths: int) -> Float[Tensor, "K *B H"]:
        self.check_num_draft_tokens(num_depths)
        last = last.to(self.head(1).weight.dtype)
        return torch.stack([self.checkpointed(self.compiled(block))(last) for block in self.blocks[:num_depths]])


class _Blocks(nn.Module):
    """x + SiLU(W x + b), one or more times."""

    def __init__(self, size: int, num_layers: int, *, bias: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(size, size, bias=bias) for _ in range(num_layers))
        for parameter in self.layers.parameters():
            nn.init.zeros_(parameter)

    def forward(self, hidden: Float[Tensor, "*B H"]) -> Float[Tensor, "*B H"]:
        for layer in self.layers:
            hidden = hidden + nn.functional.silu(layer(hidden))
        return hidden
