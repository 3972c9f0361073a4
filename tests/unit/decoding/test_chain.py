"""The batched loop on toy models whose every distribution is known."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from toy_models import (
    GREEDY,
    SAMPLED,
    SOME,
    M,
    ToyDraft,
    ToyTarget,
    V,
    decode,
    decode_one,
    greedy_text,
    logs,
    make_requests,
    random_table,
    similar_draft,
    toy_target,
)

from lkspec.decoding.chain import BONUS, PREFILL, Completion, Request
from lkspec.decoding.sampling import Sampling
from lkspec.decoding.walk import WalkCount, walk_turns
from lkspec.types import Round
from lkspec.vocab import DraftVocab


def assert_writers_tell_the_rounds(completion: Completion) -> None:
    """PREFILL once and first; then, a round at a time, depths 1..accepted and a bonus, cut at the end of the text."""
    expected = [PREFILL]
    for made in completion.rounds:
        assert made.position == len(expected)
        expected += [*range(1, made.accepted + 1), BONUS]
    num = len(completion.tokens)
    assert completion.writers == tuple(expected[:num])
    assert num <= len(expected)


# --- against decoding written out for one row ---------------------------------------------------------------------

CASES = {
    "sampled": (3, SAMPLED, DraftVocab.full(V), {}),
    "sampled-truncated": (3, SAMPLED, SOME, {}),
    "one-draft-token": (1, SAMPLED, SOME, {}),
    "seven": (7, SAMPLED, SOME, {}),
    "greedy": (3, GREEDY, DraftVocab.full(V), {}),
    "greedy-truncated": (2, GREEDY, SOME, {}),
    "filtered": (3, Sampling(temperature=0.8, top_k=3, top_p=0.9), SOME, {}),
    "filtered-same": (3, Sampling(temperature=0.8, top_k=3, top_p=0.9, draft_filter="same"), SOME, {}),
    "end-of-text": (4, SAMPLED, SOME, {"eos_ids": (3,)}),
    "two-ends": (3, SAMPLED, DraftVocab.full(V), {"eos_ids": (0, 2)}),
    "short-context": (3, SAMPLED, SOME, {"max_positions": 9}),
    "short-context-end": (6, SAMPLED, DraftVocab.full(V), {"max_positions": 8, "eos_ids": (2,)}),
}


@pytest.mark.parametrize("batch_size", [1, 5])
@pytest.mark.parametrize("name", CASES)
def test_every_row_is_decoded_by_the_book(name: str, batch_size: int) -> None:
    num_depths, sampling, vocab, options = CASES[name]
    target = toy_target(**options)
    draft = similar_draft(vocab, checked_below=target.max_positions - 2)
    requests = make_requests(25)
    completions = decode(
        target, draft, requests, num_draft_tokens=num_depths, batch_size=batch_size, sampling=sampling, seed=7
    )
    for request, got in zip(requests, completions, strict=True):
        tokens, writers, reason, rounds = decode_one(target, draft, request, sampling, num_depths, seed=7)
        assert (got.tokens, got.writers, got.finish_reason) == (tuple(tokens), tuple(writers), reason)
        # Proposals past the context limit are verified against nothing: how many are accepted there is undefined.
        room = target.max_positions - len(request.tokens)
        assert [_within(r, room) for r in got.rounds] == [_within(r, room) for r in rounds]
        assert len(tokens) + len(request.tokens) <= target.max_positions
    if "context" not in name:
        for completion in completions:
            assert_writers_tell_the_rounds(completion)
        assert {r.accepted for c in completions for r in c.rounds} >= {0, 1, min(2, num_depths)}
    assert {c.finish_reason for c in completions} == ({"stop", "length"} if target.eos_ids else {"length"})


def _within(made: Round, room: int) -> Round:
    return Round(made.position, min(made.accepted, room - made.position), made.past_end)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["T0", "T1"])
def test_results_depend_on_neither_batch_size_nor_order(sampling: Sampling) -> None:
    target, draft = toy_target(eos_ids=(3,)), similar_draft(SOME)
    requests = make_requests(30, seed=1)
    one_by_one = decode(target, draft, requests, batch_size=1, sampling=sampling)
    assert decode(target, draft, requests, batch_size=7, sampling=sampling) == one_by_one
    assert decode(target, draft, requests, batch_size=64, sampling=sampling) == one_by_one
    backwards = decode(target, draft, requests[::-1], batch_size=4, sampling=sampling)
    assert backwards[::-1] == one_by_one


def test_seed_and_turn_choose_the_random_numbers() -> None:
    target, draft = toy_target(), similar_draft(SOME)
    requests = [Request("p", turn, (1, 2, 3), 30) for turn in (0, 1)]
    first, second = decode(target, draft, requests)
    assert first.tokens != second.tokens
    assert decode(target, draft, requests, seed=1)[0].tokens != first.tokens


# --- the law of the text ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_draft_tokens", [0, 1, 3])
def test_sampled_text_has_the_targets_law(num_draft_tokens: int) -> None:
    """Chi-square of the prefill's token and the next two against the target's chain."""
    target = ToyTarget(random_table(M, 4, seed=4, scale=1.0))
    vocab = DraftVocab(torch.tensor([0, 2, 3]), 4)
    draft = ToyDraft(random_table(M, 3, seed=5), vocab) if num_draft_tokens else None
    requests = [Request(f"p{i}", 0, (1, 2), 3) for i in range(1500)]
    completions = decode(target, draft, requests, num_draft_tokens=num_draft_tokens, batch_size=500)
    counts = Counter(c.tokens for c in completions)
    statistic = 0.0
    for cell in np.ndindex(4, 4, 4):
        text, mass = (1, 2), 1.0
        for token in cell:
            mass *= float(target.table[target.context(text), token])
            text = (*text, token)
        statistic += (counts[cell] - len(requests) * mass) ** 2 / (len(requests) * mass)
    degrees = torch.tensor(63 / 2, dtype=torch.float64)
    p_value = float(torch.special.gammaincc(degrees, torch.tensor(statistic / 2, dtype=torch.float64)))
    assert p_value > 1e-4


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED, Sampling(temperature=0.5, top_k=2, draft_filter="same")])
def test_a_draft_equal_to_the_target_is_always_accepted(sampling: Sampling) -> None:
    target = toy_target()
    draft = ToyDraft(target.table, DraftVocab.full(V))
    completions = decode(target, draft, make_requests(20, most_new=30), num_draft_tokens=4, sampling=sampling)
    rounds = [r for c in completions for r in c.rounds]
    assert len(rounds) > 40
    assert {r.accepted for r in rounds} == {4}


def test_a_draft_that_is_never_right_costs_one_round_a_token() -> None:
    target = toy_target()
    wrong = torch.nn.functional.one_hot(target.table.argmin(-1), V).double()
    (completion,) = decode(
        target, ToyDraft(wrong, DraftVocab.full(V)), [Request("p", 0, (1,), 9)], sampling=GREEDY, num_draft_tokens=2
    )
    assert [r.accepted for r in completion.rounds] == [0] * 8
    assert completion.writers == (PREFILL, *[BONUS] * 8)
    assert completion.tokens == greedy_text(target, (1,), 9)[1:]


def walk_of(
    target: ToyTarget, draft: ToyDraft, completion: Completion, num_depths: int, sampling: Sampling
) -> WalkCount:
    """The walk along a completion, with a_k from the tables."""
    prompt = completion.request.tokens
    text = (*prompt, *completion.tokens)
    accept = np.zeros((num_depths, len(text)))
    for anchor in range(len(prompt) - 1, len(text)):
        for depth in range(1, num_depths + 1):
            if (place := anchor + 1 + depth) < len(text):
                context = target.context(text[:place])
                p = sampling.target_probs(logs(target.table)[context])[text[place]]
                q = draft.vocab.expand(sampling.draft_probs(logs(draft.table)[context]))[text[place]]
                accept[depth - 1, anchor] = min(1.0, float(q / p))
    turns = torch.tensor([[0] * len(prompt) + [1] * len(completion.tokens)])
    return walk_turns(torch.from_numpy(accept)[:, None], turns).count(0, num_depths)


def whole_rounds(completion: Completion) -> list[Round]:
    return [r for r in completion.rounds if not r.past_end]


def test_the_greedy_walk_is_the_decoding() -> None:
    target, draft = toy_target(eos_ids=(3,)), similar_draft(SOME)
    for completion in decode(target, draft, make_requests(20, most_new=30), sampling=GREEDY):
        walked = walk_of(target, draft, completion, 3, GREEDY)
        rounds = whole_rounds(completion)
        assert (walked.rounds, walked.accepted) == (len(rounds), sum(r.accepted for r in rounds))


def test_the_sampled_walk_expects_what_decoding_does() -> None:
    """Given each text, rounds and accepted tokens minus the walk's have mean zero: z-tests over texts."""
    target = ToyTarget(random_table(M, V, seed=0, scale=1.0), eos_ids=(3,))
    draft = ToyDraft(random_table(M, V, seed=2, scale=1.0), DraftVocab.full(V))
    requests = [Request(f"p{i}", 0, (1, 2), 24) for i in range(400)]
    differences = []
    for completion in decode(target, draft, requests, batch_size=100):
        walked, rounds = walk_of(target, draft, completion, 3, SAMPLED), whole_rounds(completion)
        at_least = [sum(r.accepted >= k for r in rounds) for k in (1, 2, 3)]
        differences.append([len(rounds) - walked.rounds, *np.subtract(at_least, walked.accepted_at_least)])
    values = np.array(differences)
    errors = values.std(0) / math.sqrt(len(values))
    assert (values.std(0) > 0.3).all(), "a pair whose texts leave the rounds open"
    assert (np.abs(values.mean(0)) < 4 * errors).all()
