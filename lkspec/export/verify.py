"""Compares the q of two drafts on a real prompt, through the decoding path."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lkspec.benchmarks.base import BenchmarkPrompt
from lkspec.benchmarks.mini import Mini
from lkspec.decoding.chain import ChainDecoder, Request
from lkspec.decoding.sampling import Sampling
from lkspec.drafts.base import Draft
from lkspec.targets.base import Target
from lkspec.types import FreshStates, TargetStates

TOLERANCE = 1e-5
_NUM_ANSWER_TOKENS = 16
_NUM_ANCHORS = 4


@dataclass(frozen=True)
class RealText:
    """A prompt with the target's greedy answer, as the target has read it.

    Attributes:
        prompt_id: which prompt.
        tokens: prompt and answer.
        states: the target's at every token.
    """

    prompt_id: str
    tokens: Int[Tensor, " T"]
    states: TargetStates

    @classmethod
    @torch.inference_mode()
    def answered_by(cls, target: Target, *, num_draft_tokens: int, prompt: BenchmarkPrompt | None = None) -> RealText:
        """Lets the target answer a prompt's first turn, by default mini_chat's first; one too long for it is cut."""
        prompt = prompt or Mini(suite="chat").prompts()[0]
        ids = target.prompt_ids([{"role": "user", "content": prompt.turns[0]}])
        room = target.max_positions - _NUM_ANSWER_TOKENS - num_draft_tokens
        request = Request(prompt.id, 0, ids[:room], _NUM_ANSWER_TOKENS)
        alone = ChainDecoder(target, None, sampling=Sampling(temperature=0), num_draft_tokens=0, batch_size=1)
        answer = next(alone.run([request])).tokens
        tokens = torch.tensor([*request.tokens, *answer], device=target.device)
        positions = torch.arange(len(tokens), device=target.device)[None]
        return cls(prompt.id, tokens, target.step(tokens[None], positions, target.new_cache(1)))

    @property
    def anchors(self) -> list[int]:
        """The last ones whose next token is known."""
        return list(range(max(0, len(self.tokens) - 1 - _NUM_ANCHORS), len(self.tokens) - 1))


@torch.inference_mode()
def largest_q_difference(first: Draft, second: Draft, text: RealText, *, num_draft_tokens: int) -> float:
    """max |q - q'| over anchors, depths 1..K and the target's vocabulary.

    Both drafts read the tokens that the first one proposes.
    """
    differences = []
    for anchor in text.anchors:
        tokens, q = _proposed(first, text, anchor, num_draft_tokens, forced=None)
        _, other = _proposed(second, text, anchor, num_draft_tokens, forced=tokens)
        differences.append((q - other).abs().max())
    return float(torch.stack(differences).max())  # NaN if any is


def _proposed(
    draft: Draft, text: RealText, anchor: int, num_draft_tokens: int, *, forced: Int[Tensor, " K"] | None
) -> tuple[Int[Tensor, " K"], Float[Tensor, "K V"]]:
    """One round from a fresh cache: the drafted tokens (argmax, unless forced) and q at each depth."""
    read = slice(0, anchor + 1)
    device = text.tokens.device
    fresh = FreshStates(
        next_tokens=text.tokens[None, 1 : anchor + 2],
        positions=torch.arange(anchor + 1, device=device)[None],
        states=TargetStates(aux=text.states.aux[:, read], last=text.states.last[:, read]),
        lengths=torch.tensor([anchor + 1], device=device),
    )
    q: list[Tensor] = []

    def sample(logits: Float[Tensor, "B D"]) -> Int[Tensor, " B"]:
        q.append(draft.vocab.expand(logits.double().softmax(-1))[0])
        return logits.argmax(-1) if forced is None else draft.vocab.to_draft(forced[len(q) - 1 : len(q)])

    tokens = draft.propose(draft.new_cache(1), fresh, sample, num_draft_tokens)
    return tokens[0], torch.stack(q)
