"""Where a draft fails, token by token: a pass of target and draft along held-out answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from lkspec.app.application import instantiate
from lkspec.app.load import TrainedRun, load_run
from lkspec.data.chat import Encoded
from lkspec.data.dataset import collate
from lkspec.measure.walk import draft_stats
from lkspec.runs.folder import RunFolder
from lkspec.runs.token_rows import TokenRow
from lkspec.types import LinearHead

_CHUNK = 256  # target rows whose logits are alive together


@torch.inference_mode()
def measure_tokens(folder: RunFolder, *, temperature: float = 1.0, num_conversations: int = 40) -> list[TokenRow]:
    """Statistics of every token of some validation answers, evenly spaced over the set, at every trained depth.

    Raises:
        ValueError: as ``load_run``; no validation conversation of that temperature.
    """
    run = load_run(folder)
    data = instantiate(run.config.data)
    data.bind(run.target.tokenizer, eos_ids=run.target.eos_ids, max_positions=run.target.max_positions)
    data.setup()
    everything = data.val_conversations(temperature)
    count = min(num_conversations, len(everything))
    chosen = [everything[index * len(everything) // count] for index in range(count)]
    return [row for encoded in chosen for row in _rows(run, encoded)]


def _rows(run: TrainedRun, encoded: Encoded) -> Iterator[TokenRow]:
    batch = collate([[encoded]]).to(run.target.device)
    states = run.target.states(batch)
    stats = draft_stats(run.draft, batch, states, run.target.head)
    entropy = target_entropy(states.last[0], run.target.head)
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
            text=str(run.target.tokenizer.decode([encoded.tokens[slot]])),
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
