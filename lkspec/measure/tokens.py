"""Where a draft fails, token by token: a pass of target and draft along answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from lkspec.data.chat import Encoded
from lkspec.data.dataset import collate
from lkspec.drafts.base import Draft
from lkspec.runs.rows import TokenRow
from lkspec.targets.base import Target
from lkspec.training.statistics import draft_stats
from lkspec.types import LinearHead

_CHUNK = 256  # target rows whose logits are alive together


@torch.inference_mode()
def measure_tokens(target: Target, draft: Draft, answers: Sequence[Encoded]) -> list[TokenRow]:
    """Statistics at T = 1 of every token of some answers, at every trained depth."""
    return [row for encoded in answers for row in _rows(target, draft, encoded)]


def _rows(target: Target, draft: Draft, encoded: Encoded) -> Iterator[TokenRow]:
    batch = collate([[encoded]]).to(target.device)
    states = target.states(batch)
    stats = draft_stats(draft, batch, states, target.head)
    entropy = target_entropy(states.last[0], target.head)
    alpha = stats.log_alpha.exp()
    turns = batch.turns[0].tolist()
    first: dict[int, int] = {}
    for slot, turn in enumerate(turns):
        first.setdefault(turn, slot)
    # At anchor t depth k proposes x_{t+1+k}, whose target distribution is row t + k.
    for index, _, anchor in torch.nonzero(stats.mask).tolist():
        slot = anchor + index + 2
        yield TokenRow(
            conversation=encoded.id,
            position=slot - first[turns[slot]],
            text=str(target.tokenizer.decode([encoded.tokens[slot]])),
            depth=index + 1,
            alpha=float(alpha[index, 0, anchor]),
            accept_prob=float(stats.accept_prob[index, 0, anchor]),
            entropy=float(entropy[slot - 1]),
            coverage=float(stats.coverage[index, 0, anchor]),
        )


def target_entropy(last: Float[Tensor, "T H"], head: LinearHead) -> Float[Tensor, " T"]:
    """Entropy of the target's distribution at each slot, in nats."""
    parts: Sequence[Tensor] = [head.logits(rows).float().log_softmax(-1) for rows in last.split(_CHUNK)]
    return torch.cat([-(logprobs.exp() * logprobs).sum(-1) for logprobs in parts])
