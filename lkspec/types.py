"""The frozen dataclasses that cross the borders between packages.

Shape letters used everywhere: B rows of a batch, T slots of a row, K depths, H hidden size, A auxiliary layers,
V target vocabulary, D draft vocabulary, S newly read slots, R target rows of a chunk, N heads, L slots of a cache.

Indices follow contract 1 (0-based): ``tokens[b, t]`` is x_t. At anchor t the target has read x_0..x_t and x_{t+1} is
known; the draft at depth k = 1..K proposes x_{t+1+k}, whose target distribution is the target's logits row t + k.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn


class _Movable:
    """Moves every tensor of a frozen dataclass at once, those of its parts too."""

    def to(self, device: torch.device | str) -> Self:
        moved: dict[str, object] = {}
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                moved[field.name] = value.to(device, non_blocking=True)
            elif isinstance(value, _Movable):
                moved[field.name] = value.to(device)
        return replace(self, **moved)  # type: ignore[type-var]


@dataclass(frozen=True)
class Batch(_Movable):
    """Rows of tokenised conversations, padded on the right or packed.

    Attributes:
        tokens: token ids; padding holds 0.
        positions: position of each token within its own conversation (what RoPE sees).
        segments: conversation number within the row, counted from 1; 0 is padding.
        turns: assistant turn number within the row, counted from 1; 0 is text that is not supervised.
        ids: one name a conversation, row by row, in the order of its segment number.
        origin: the batch that this one was moved from; None where it was made.
    """

    tokens: Int[Tensor, "B T"]
    positions: Int[Tensor, "B T"]
    segments: Int[Tensor, "B T"]
    turns: Int[Tensor, "B T"]
    ids: tuple[tuple[str, ...], ...]
    origin: Batch | None = None

    def to(self, device: torch.device | str) -> Self:
        return replace(super(Batch, replace(self, origin=None)).to(device), origin=self.as_made)

    @property
    def as_made(self) -> Batch:
        """The same batch where it was made, on the host as a rule: to read it there waits for no device."""
        return self if self.origin is None else self.origin

    @property
    def is_packed(self) -> bool:
        """Whether any row holds more than one conversation."""
        return any(len(row) > 1 for row in self.ids)

    def depth_mask(self, num_depths: int) -> Bool[Tensor, "K B T"]:
        """``mask[k-1, b, t]`` = 1 iff x_{t+1} .. x_{t+1+k} all belong to the same assistant turn (contract 1)."""
        turns = self.turns
        shifted = torch.zeros(num_depths + 1, *turns.shape, dtype=turns.dtype, device=turns.device)
        for offset in range(1, min(num_depths + 1, turns.shape[1] - 1) + 1):
            shifted[offset - 1, :, :-offset] = turns[:, offset:]
        same_turn = (shifted == shifted[:1]) & (shifted[:1] > 0)
        return same_turn.int().cumprod(0)[1:].bool()

    @property
    def num_supervised(self) -> int:
        """Tokens inside assistant turns."""
        return int((self.turns > 0).sum())

    def conversations(self) -> Iterator[BatchConversation]:
        """Every conversation, row by row."""
        made = self.as_made
        tokens, segments = made.tokens.cpu(), made.segments.cpu()  # one copy, if any, not one a conversation
        for row, names in enumerate(self.ids):
            for number, name in enumerate(names, start=1):
                found = torch.nonzero(segments[row] == number)[:, 0]
                slots = slice(int(found[0]), int(found[-1]) + 1)
                key = text_key(tokens[row, slots])
                yield BatchConversation(name, key, row, slots, self.tokens[row, slots], self.turns[row, slots])


@dataclass(frozen=True)
class BatchConversation:
    """One conversation of a batch: where it stands and its L tokens.

    Attributes:
        key: see ``text_key``; unlike the name it does not stand for two texts.
    """

    name: str
    key: str
    row: int
    slots: slice
    tokens: Int[Tensor, " L"]
    turns: Int[Tensor, " L"]

    def alone(self) -> Batch:
        """A batch of nothing but this conversation."""
        positions = torch.arange(len(self.tokens), device=self.tokens.device)
        segments = torch.ones_like(self.tokens)
        return Batch(self.tokens[None], positions[None], segments[None], self.turns[None], ((self.name,),))


def text_key(tokens: Int[Tensor, " L"]) -> str:
    """32 hex digits of sha256 over a conversation's tokens: all that a given target's states of it depend on."""
    return hashlib.sha256(tokens.cpu().to(torch.int64).numpy().tobytes()).hexdigest()[:32]


@dataclass(frozen=True)
class HeadSummary(_Movable):
    """Log-normaliser and argmax of the target's logits over the whole vocabulary, at temperature 1 and unfiltered.

    With these two numbers a slot, p over a draft vocabulary takes the head's rows of that vocabulary alone:
    ``log p_v = z_v - log_normaliser``.

    Attributes:
        log_normaliser: log sum_v exp z_v, in float32 at least.
        argmax: the token of the largest logit.
    """

    log_normaliser: Float[Tensor, "*slots"]
    argmax: Int[Tensor, "*slots"]


@dataclass(frozen=True)
class TargetStates(_Movable):
    """What a draft may read of the target at each slot, and what a loss may.

    Attributes:
        aux: the auxiliary hidden states (those that enter three of its layers), concatenated low to high.
        last: the hidden state that multiplies the target's head (after the final norm).
        summary: of ``last``'s logits; None where nobody has computed it.
    """

    aux: Float[Tensor, "B T AH"]
    last: Float[Tensor, "B T H"]
    summary: HeadSummary | None = None

    @classmethod
    def of_conversations(cls, batch: Batch, parts: Iterable[tuple[BatchConversation, TargetStates]]) -> TargetStates:
        """A batch's states, put together from those [L, AH] and [L, H] of each of its conversations; zero elsewhere."""
        whole: TargetStates | None = None
        for conversation, states in parts:
            if whole is None:
                whole = cls._of(part.new_zeros(*batch.tokens.shape, *part.shape[1:]) for part in states.tensors())
            for place, part in zip(whole.tensors(), states.tensors(), strict=True):
                place[conversation.row, conversation.slots] = part
        assert whole is not None, "a batch without any conversation has no states to put together"
        return whole

    @classmethod
    def _of(cls, tensors: Iterable[Tensor]) -> TargetStates:
        aux, last, *summary = tensors
        return cls(aux=aux, last=last, summary=HeadSummary(*summary) if summary else None)

    def at(self, *index: int | slice | Tensor) -> TargetStates:
        """Those of some slots."""
        return self._of(tensor[index] for tensor in self.tensors())

    def tensors(self) -> tuple[Tensor, ...]:
        """All of them, the summary's last."""
        summary = () if self.summary is None else (self.summary.log_normaliser, self.summary.argmax)
        return (self.aux, self.last, *summary)


def check_sharpness(sharpness: float) -> None:
    """Refuses what is no exponent of q.

    Raises:
        ValueError: not positive and finite.
    """
    if not 0 < sharpness < math.inf:
        raise ValueError(f"sharpness: expected a positive number (1 changes nothing), got {sharpness:g}")


@dataclass(frozen=True)
class LinearHead(_Movable):
    """A complete description of a head: ``logits = soft_cap * tanh((scale * (h W^T) + bias) / soft_cap)``.

    ``soft_cap`` None means no cap. ``W`` is ``weight`` [V, H].
    """

    weight: Float[Tensor, "V H"]
    bias: Float[Tensor, " V"] | None = None
    scale: float = 1.0
    soft_cap: float | None = None

    def logits(self, hidden: Float[Tensor, "... H"]) -> Float[Tensor, "... V"]:
        """Logits of hidden states, computed in the head's own precision."""
        logits = torch.nn.functional.linear(hidden.to(self.weight.dtype), self.weight)
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.bias is not None:
            logits = logits + self.bias
        if self.soft_cap is not None:
            logits = self.soft_cap * torch.tanh(logits / self.soft_cap)
        return logits

    def sharpened(self, sharpness: float) -> LinearHead:
        """The head whose logits are ``sharpness`` times these: q^sharpness, renormalised, in place of q."""
        if sharpness == 1.0:
            return self
        bias = None if self.bias is None else self.bias * sharpness
        soft_cap = None if self.soft_cap is None else self.soft_cap * sharpness
        return replace(self, scale=self.scale * sharpness, bias=bias, soft_cap=soft_cap)


@dataclass(frozen=True)
class TokenStats(_Movable):
    """Per-token statistics of (target p, draft q), shape [K, B, T], zero where the mask is 0.

    Attributes:
        mask: which entries count (contract 1).
        kl: KL(p~ || q), p~ = p renormalised over the draft vocabulary.
        reverse_kl: KL(q || p~).
        log_alpha: log sum_v min(p_v, q_v), p with its full-vocabulary denominator.
        accept_prob: min(1, q(x) / p(x)) of the text's own token x.
        top1: 1 where argmax q equals the target's full-vocabulary argmax.
        hit: 1 where argmax q equals the text's own token (what a walk at T = 0 accepts).
        coverage: target mass inside the draft vocabulary.
        row_value: the value of a form (b) objective, when one was given.
        value: the objective's value, where its gradient was formed in the forward pass; the others then carry none.
    """

    mask: Bool[Tensor, "K B T"]
    kl: Float[Tensor, "K B T"]
    reverse_kl: Float[Tensor, "K B T"]
    log_alpha: Float[Tensor, "K B T"]
    accept_prob: Float[Tensor, "K B T"]
    top1: Float[Tensor, "K B T"]
    hit: Float[Tensor, "K B T"]
    coverage: Float[Tensor, "K B T"]
    row_value: Float[Tensor, "K B T"] | None = None
    value: Float[Tensor, "K B T"] | None = None


@dataclass(frozen=True)
class FreshStates(_Movable):
    """What the target has newly read of each row: the anchors whose entries a draft's cache still lacks.

    Attributes:
        next_tokens: x_{t+1} of each new anchor t.
        positions: t.
        states: the target's states at t.
        lengths: how many of the S slots are real (>= 1); the last real one is the anchor of the coming round.
    """

    next_tokens: Int[Tensor, "B S"]
    positions: Int[Tensor, "B S"]
    states: TargetStates
    lengths: Int[Tensor, " B"]

    def at(self, rows: slice | Tensor, slots: slice = slice(None)) -> FreshStates:
        """Those of some rows and slots."""
        tokens, positions = self.next_tokens[rows, slots], self.positions[rows, slots]
        return FreshStates(tokens, positions, self.states.at(rows, slots), self.lengths[rows])

    def at_anchor(self, values: Shaped[Tensor, "B S *rest"]) -> Shaped[Tensor, B * rest]:
        """Of something of each slot, that of the coming round's anchor."""
        return values[torch.arange(len(values), device=values.device), self.lengths - 1]


@dataclass(frozen=True)
class Proposal:
    """K drafted tokens a row.

    Attributes:
        tokens: ids in the target vocabulary.
        probs: q at each depth, over the draft vocabulary; of no depth (k = 0) where drafting is greedy.
    """

    tokens: Int[Tensor, "B K"]
    probs: Float[Tensor, "B k D"]


@dataclass(frozen=True)
class Round:
    """One verification of K drafted tokens.

    Attributes:
        position: index of the first proposed token in the generated text.
        accepted: drafted tokens accepted, counted before the output is cut.
        past_end: whether any of the K proposals lies past the end of the final text.
    """

    position: int
    accepted: int
    past_end: bool


#: Samples one draft-vocabulary id a row from draft logits [B, D] and remembers q; depths come in order.
DraftSampler = Callable[[Float[Tensor, "B D"]], Int[Tensor, " B"]]


def stack_rows(rows: Iterable[Tensor]) -> Tensor:
    """Stacks tensors of different first length, padded with zeros at the end."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)


@dataclass(frozen=True)
class DecoderDims:
    """The dimensions of one decoder layer of the target, which a draft's own layer mirrors.

    ``inv_freq`` [head_dim / 2] and ``rope_attention_factor`` are RoPE as the target computes it;
    ``rope_parameters`` says the same in the words of a transformers config, for export.
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    rms_norm_eps: float
    max_positions: int
    inv_freq: Float[Tensor, " half"]
    rope_attention_factor: float
    rope_parameters: dict[str, object]


@dataclass(frozen=True)
class TargetSpec:
    """What a draft is built from: the target's dimensions and the tensors it may copy or share.

    Attributes:
        dims: one decoder layer of the target.
        embedding: raw rows of the input embedding.
        head: the target's head; a draft's head starts from its rows.
        num_aux: auxiliary states that TargetStates.aux concatenates.
        model_type: the architecture, in the words of a transformers config.
        new_layer: makes one decoder layer of the target's own class that stands alone (``layer(hidden, positions, mask,
            cache)``, attribute ``window``), with the weights of the target's last such layer (True) or random ones.
    """

    dims: DecoderDims
    embedding: Float[Tensor, "V H"]
    head: LinearHead
    num_aux: int
    model_type: str
    new_layer: Callable[[bool], nn.Module]
