"""The walk of a draft along texts that the target wrote."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lkspec.data.dataset import EncodedStore, collate
from lkspec.data.planning import plan_evaluation
from lkspec.decoding.walk import WalkCount, walk_turns
from lkspec.drafts.base import Draft
from lkspec.losses.fused.head_summary import head_summary
from lkspec.runs.rows import WalkRow
from lkspec.targets.base import Target
from lkspec.training.statistics import draft_stats
from lkspec.types import Batch, TargetStates, TokenStats, stack_rows

_TEXT_TOKENS = (2048, 16384)  # padded tokens a batch of the walk, on a CPU and elsewhere


def accept_probability(stats: TokenStats, temperature: float) -> Float[Tensor, "K B T"]:
    """a_k at each anchor, from statistics at the temperature of the text.

    min(1, q(x) / p(x)) for the text's own token x; at T = 0, of which there are no statistics and where those of any
    temperature do, 1 where argmax q = x and 0 elsewhere.
    """
    return stats.hit if temperature == 0 else stats.accept_prob


def walk_rows(
    batch: Batch,
    stats: TokenStats,
    *,
    temperature: float,
    num_depths: int,
    steps: int,
    sharpness: float = 1.0,
) -> list[WalkRow]:
    """The walk along every conversation of a batch with rounds of 1, 2, .. K drafted tokens, and its sums of alpha.

    Args:
        batch: conversations that the target wrote.
        stats: their statistics at the temperature of the text, for T = 0 at 1.
        temperature: of the text.
        num_depths: the largest K.
        steps: optimiser steps taken before.
        sharpness: of the q behind the statistics.
    """
    mask = stats.mask[:num_depths].cpu().numpy()
    alpha = np.where(mask, stats.log_alpha[:num_depths].cpu().double().exp().numpy(), 0.0)
    walks = walk_turns(accept_probability(stats, temperature)[:num_depths], batch.turns)
    rows = []
    for conversation in batch.conversations():
        slots = conversation.slots
        # A turn that begins its conversation has no anchor in it.
        own = (walks.rows == conversation.row) & (slots.start < walks.begins) & (walks.begins < slots.stop)
        at_least = walks.at_least[own].sum(0)
        columns = zip(
            mask[:, conversation.row, slots].sum(-1).tolist(),
            alpha[:, conversation.row, slots].sum(-1).tolist(),
            walks.rounds[own].sum(0).tolist(),
            at_least.sum(-1).tolist(),
            at_least[-1].tolist(),
            strict=True,
        )
        rows += [
            WalkRow(conversation.name, conversation.key, temperature, steps, depth, sharpness, *values)
            for depth, values in enumerate(columns, start=1)
        ]
    return rows


@torch.inference_mode()
def walk_answers(
    target: Target,
    draft: Draft,
    answers: EncodedStore,
    *,
    states: Callable[[Batch], TargetStates],
    num_draft_tokens: int,
    steps: int,
    sharpness: Sequence[float] = (1.0,),
) -> list[WalkRow]:
    """Walks conversations that the target wrote, each at the temperature that it was written at.

    Args:
        target, draft: the models.
        answers: conversations of known temperatures.
        states: the target's of a batch: its own ``states``, or a capture.
        num_draft_tokens: the largest K.
        steps: optimiser steps that the draft has taken.
        sharpness: walks with q^s, renormalised, in place of q for each of these s; at T = 0, where it changes
            nothing, once with q.
    """
    rows: list[WalkRow] = []
    max_tokens = max([_text_tokens(target), *answers.lengths])
    for temperature in set(answers.temperatures):
        assert temperature is not None
        chosen = [index for index, written_at in enumerate(answers.temperatures) if written_at == temperature]
        for (plan,) in plan_evaluation(answers.lengths, chosen, max_tokens=max_tokens, num_replicas=1, rank=0):
            batch = collate([[answers[index] for index in row] for row in plan]).to(target.device)
            known, powers = states(batch), sharpness if temperature else (1.0,)
            if len(powers) > 1 and temperature == 1 and known.summary is None and not draft.vocab.is_full:
                known = replace(known, summary=head_summary(target.head, known.last))  # once, not for each power
            for power in powers:
                stats = draft_stats(
                    draft,
                    batch,
                    known,
                    target.head,
                    num_depths=num_draft_tokens,
                    sharpness=power,
                    temperature=temperature or 1.0,
                )
                rows += walk_rows(
                    batch,
                    stats,
                    temperature=temperature,
                    num_depths=num_draft_tokens,
                    steps=steps,
                    sharpness=power,
                )
    return rows


@torch.inference_mode()
def walk_texts(
    target: Target,
    draft: Draft,
    texts: Sequence[tuple[str, Sequence[int], Sequence[int]]],
    *,
    temperature: float,
    num_draft_tokens: int,
    sharpness: float = 1.0,
) -> list[tuple[WalkCount | None, ...]]:
    """Walks answers that the target wrote at a temperature, with rounds of 1, 2, .. K drafted tokens.

    Args:
        target: the target.
        draft: the draft.
        texts: (name, prompt tokens, answer tokens) of each.
        temperature: at which the answers were sampled, without filters.
        num_draft_tokens: the largest K.
        sharpness: of q, as in ``draft_stats``.

    Returns:
        The count of each text at each K; None where the answer is too short for one whole round.
    """
    counts: dict[int, tuple[WalkCount | None, ...]] = {}
    lengths = [len(prompt) + len(answer) for _, prompt, answer in texts]
    for indices in _grouped(lengths, _text_tokens(target)):
        batch = as_batch([texts[index] for index in indices]).to(target.device)
        stats = draft_stats(
            draft,
            batch,
            target.states(batch),
            target.head,
            num_depths=num_draft_tokens,
            sharpness=sharpness,
            temperature=temperature or 1.0,
        )
        walks = walk_turns(accept_probability(stats, temperature), batch.turns)
        for turn, row in enumerate(walks.rows.tolist()):
            along = [walks.count(turn, depth) for depth in range(1, num_draft_tokens + 1)]
            counts[indices[row]] = tuple(count if count.rounds > 0 else None for count in along)
    return [counts.get(index, (None,) * num_draft_tokens) for index in range(len(texts))]


def _text_tokens(target: Target) -> int:
    return _TEXT_TOKENS[target.device.type != "cpu"]


def _grouped(lengths: Sequence[int], max_tokens: int) -> Iterable[list[int]]:
    """Indices in batches of similar length, each within the padded area."""
    group: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if group and (len(group) + 1) * lengths[index] > max_tokens:
            yield group
            group = []
        group.append(index)
    if group:
        yield group


def as_batch(texts: Sequence[tuple[str, Sequence[int], Sequence[int]]]) -> Batch:
    """(name, prompt, answer) of texts as conversations of one turn, a row each."""
    tokens = stack_rows(torch.tensor([*prompt, *answer]) for _, prompt, answer in texts)
    turns = stack_rows(torch.tensor([0] * len(prompt) + [1] * len(answer)) for _, prompt, answer in texts)
    segments = stack_rows(torch.ones(len(prompt) + len(answer), dtype=torch.int64) for _, prompt, answer in texts)
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    return Batch(tokens, positions, segments, turns, tuple((name,) for name, _, _ in texts))
