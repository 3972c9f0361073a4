"""The batched loop on toy models whose every distribution is known."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from toy_models import ScriptedDraft, ToyDraft, ToyTarget, decode_one, logs, random_table

from lkspec.decoding.chain import BONUS, PREFILL, ChainDecoder, Completion, Request
from lkspec.decoding.sampling import Sampling
from lkspec.decoding.walk import WalkCount, walk_turn
from lkspec.types import Round
from lkspec.vocab import DraftVocab

V, M = 5, 11
SOME = DraftVocab(torch.tensor([0, 1, 3]), V)
GREEDY, SAMPLED = Sampling(temperature=0.0), Sampling(temperature=1.0)


def toy_target(**options) -> ToyTarget:
    return ToyTarget(random_table(M, V, seed=0), **options)


def similar_draft(vocab: DraftVocab, **options) -> ToyDraft:
    """Close enough to the toy target that every number of accepted tokens occurs."""
    mixed = 0.5 * vocab.restrict(random_table(M, V, seed=0)) + 0.5 * random_table(M, vocab.size, seed=1)
    return ToyDraft(mixed / mixed.sum(-1, keepdim=True), vocab, **options)


def make_requests(num: int, *, seed: int = 0, longest: int = 6, most_new: int = 14) -> list[Request]:
    """Prompts of different lengths with limits from 1 on."""
    rng = np.random.default_rng(seed)
    return [
        Request(
            prompt_id=f"p{i}",
            turn=i % 2,
            tokens=tuple(rng.integers(0, V, rng.integers(1, longest + 1)).tolist()),
            max_new_tokens=int(rng.integers(1, most_new + 1)),
        )
        for i in range(num)
    ]


def decode(target, draft, requests, *, num_draft_tokens=3, batch_size=4, sampling=SAMPLED, seed=0) -> list[Completion]:
    """Completions in the order of the requests."""
    decoder = ChainDecoder(
        target, draft, sampling=sampling, num_draft_tokens=num_draft_tokens, batch_size=batch_size, seed=seed
    )
    done = {(c.request.prompt_id, c.request.turn): c for c in decoder.run(requests)}
    assert len(done) == len(requests)
    return [done[r.prompt_id, r.turn] for r in requests]


def greedy_text(target: ToyTarget, prompt: tuple[int, ...], num: int) -> tuple[int, ...]:
    """Prompt and greedy continuation, as if there were no end-of-text token."""
    text = list(prompt)
    for _ in range(num):
        text.append(int(target.table[target.context(text)].argmax()))
    return tuple(text)


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
    inside = np.arange(len(text)) + 1 + num_depths < len(text)
    return walk_turn(accept, inside, len(prompt) - 1)


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


# --- ends ---------------------------------------------------------------------------------------------------------


def scripted_greedy(
    wrong_places: set[int], prompt=(1, 2), num=20, **options
) -> tuple[ToyTarget, ScriptedDraft, list[int]]:
    """A toy target, a draft that is wrong at these places of the generated text only, and the text."""
    target = ToyTarget(random_table(37, 40, seed=1), **options)
    text = greedy_text(target, prompt, num)
    draft = ScriptedDraft([text], 40, lambda position, depth: position - len(prompt) not in wrong_places)
    return target, draft, list(text[len(prompt) :])


def test_rounds_and_writers_of_a_scripted_text() -> None:
    """Wrong at places 3 and 4: rounds at 1 (accepts 1, 2), 4 (none) and 5 (all)."""
    target, draft, text = scripted_greedy({3, 4})
    (completion,) = decode(target, draft, [Request("p", 0, (1, 2), 9)], num_draft_tokens=3, sampling=GREEDY)
    assert completion.tokens == tuple(text[:9])
    assert completion.writers == (PREFILL, 1, 2, BONUS, BONUS, 1, 2, 3, BONUS)
    assert completion.rounds == (Round(1, 2, False), Round(4, 0, False), Round(5, 3, False))
    assert completion.finish_reason == "length"


@pytest.mark.parametrize(("place", "num_kept", "past_end"), [(1, 2, True), (3, 4, True), (4, 5, False), (5, 6, False)])
def test_end_of_text_inside_a_round(place: int, num_kept: int, past_end: bool) -> None:
    """K = 4 and all accepted: the round counts 4, although the text ends at a drafted token, or at the bonus."""
    _, _, text = scripted_greedy(set())
    token = text[place]
    assert token not in text[:place], "choose a text whose end is new there"
    target, draft, _ = scripted_greedy(set(), eos_ids=(token,))
    (completion,) = decode(target, draft, [Request("p", 0, (1, 2), 20)], num_draft_tokens=4, sampling=GREEDY)
    assert completion.tokens == tuple(text[:num_kept])
    assert completion.writers == (PREFILL, 1, 2, 3, 4, BONUS)[:num_kept]
    assert completion.rounds == (Round(1, 4, past_end),)
    assert completion.finish_reason == "stop"


def test_a_prefill_that_ends_the_text() -> None:
    _, _, text = scripted_greedy(set())
    target, draft, _ = scripted_greedy(set(), eos_ids=(text[0],))
    requests = [Request(f"p{i}", 0, (1, 2), 20) for i in range(5)]
    for completion in decode(target, draft, requests, batch_size=2, sampling=GREEDY):
        assert (completion.tokens, completion.writers) == ((text[0],), (PREFILL,))
        assert (completion.finish_reason, completion.rounds) == ("stop", ())


@pytest.mark.parametrize("limit", range(1, 8))
def test_the_limit_of_new_tokens(limit: int) -> None:
    target, draft, text = scripted_greedy({4})
    (completion,) = decode(target, draft, [Request("p", 0, (1, 2), limit)], num_draft_tokens=3, sampling=GREEDY)
    assert completion.tokens == tuple(text[:limit])
    assert completion.finish_reason == "length"
    # Rounds at 1 (accepts 3, so that the bonus is token 4) and, if the text goes on, at 5.
    rounds = (Round(1, 3, past_end=limit < 4), Round(5, 3, past_end=limit < 8))
    assert completion.rounds == rounds[: 0 if limit == 1 else 1 if limit <= 5 else 2]


@pytest.mark.parametrize("num_draft_tokens", [1, 3, 7])
@pytest.mark.parametrize("room", range(1, 7))
def test_the_context_limit(room: int, num_draft_tokens: int) -> None:
    """The text fills the context to the last position, whatever is drafted past it."""
    target, draft, text = scripted_greedy({2}, prompt=(1, 2, 3, 4), max_positions=4 + room)
    (completion,) = decode(
        target, draft, [Request("p", 0, (1, 2, 3, 4), 50)], num_draft_tokens=num_draft_tokens, sampling=GREEDY
    )
    assert completion.tokens == tuple(text[:room])
    assert completion.finish_reason == "length"
    assert all(r.past_end == (r.position + num_draft_tokens > room) for r in completion.rounds)


@pytest.mark.parametrize(
    ("prompt", "max_new_tokens"),
    [((1,) * 8, 4), ((1,) * 9, 1), ((), 4), ((1, 2), 0)],
    ids=["full", "over", "empty", "none"],
)
def test_a_prompt_that_leaves_no_room_is_refused(prompt: tuple[int, ...], max_new_tokens: int) -> None:
    decoder = ChainDecoder(toy_target(max_positions=8), None, sampling=GREEDY, num_draft_tokens=0, batch_size=2)
    with pytest.raises(ValueError, match=rf"'long' \(turn 3\): {len(prompt)} tokens .*context of 8"):
        list(decoder.run([Request("long", 3, prompt, max_new_tokens)]))


@pytest.mark.parametrize(("num_draft_tokens", "batch_size", "name"), [(0, 1, "num_draft_tokens"), (2, 0, "batch_size")])
def test_settings_out_of_range(num_draft_tokens: int, batch_size: int, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
        ChainDecoder(
            toy_target(), similar_draft(SOME), sampling=GREEDY, num_draft_tokens=num_draft_tokens, batch_size=batch_size
        )


# --- batches ------------------------------------------------------------------------------------------------------


def test_without_a_draft_there_are_no_rounds() -> None:
    target = toy_target()
    requests = make_requests(9)
    for completion in decode(target, None, requests, num_draft_tokens=5, sampling=GREEDY):
        prompt, num = completion.request.tokens, completion.request.max_new_tokens
        assert completion.tokens == greedy_text(target, prompt, num)[len(prompt) :]
        assert completion.writers == (PREFILL, *[BONUS] * (num - 1))
        assert completion.rounds == ()


def test_slots_are_refilled_and_idle_ones_dropped() -> None:
    """Ten requests in four slots: four rows while any wait, and fewer once half of them have ended."""
    target, draft = toy_target(), similar_draft(SOME)
    requests = [Request(f"p{i}", 0, (1, i % V), 4 + 3 * i) for i in range(10)]
    decode(target, draft, requests, batch_size=4, num_draft_tokens=1)
    rounds = [width for width in target.widths if width > 1]
    assert target.widths.count(1) >= 10, "one prefill a request"
    assert set(rounds) == {4, 2}
    assert rounds == sorted(rounds, reverse=True)
    sizes = [width for width in target.widths[4:] if width == 1]
    assert len(sizes) > 6, "the last row is decoded alone"


def test_completions_arrive_as_they_finish() -> None:
    target, draft = toy_target(), similar_draft(SOME)
    requests = [Request("long", 0, (1,), 60), Request("short", 0, (1,), 2), Request("middle", 0, (1,), 12)]
    decoder = ChainDecoder(target, draft, sampling=SAMPLED, num_draft_tokens=2, batch_size=2)
    assert [c.request.prompt_id for c in decoder.run(requests)] == ["short", "middle", "long"]


def test_no_requests_no_completions() -> None:
    decoder = ChainDecoder(toy_target(), None, sampling=GREEDY, num_draft_tokens=0, batch_size=2)
    assert list(decoder.run([])) == []
