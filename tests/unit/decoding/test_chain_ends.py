"""How texts end, which settings are refused, and how slots of a batch are used."""

from __future__ import annotations

import pytest
from toy_models import (
    GREEDY,
    SAMPLED,
    SOME,
    ScriptedDraft,
    ToyTarget,
    V,
    decode,
    greedy_text,
    make_requests,
    random_table,
    similar_draft,
    toy_target,
)

from lkspec.decoding.chain import BONUS, PREFILL, ChainDecoder, Request
from lkspec.decoding.sampling import Sampling
from lkspec.types import Round


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


def test_slots_are_refilled_and_finished_ones_dropped() -> None:
    """Ten requests in four slots: four rows while any wait, and then only those whose text goes on."""
    target, draft = toy_target(), similar_draft(SOME)
    requests = [Request(f"p{i}", 0, (1, i % V), 4 + 3 * i) for i in range(10)]
    decode(target, draft, requests, batch_size=4, num_draft_tokens=2)
    rounds = [rows for rows, width in target.steps if width == 3]
    assert set(rounds) == {4, 3, 2, 1}
    assert rounds == sorted(rounds, reverse=True)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["T0", "T1"])
@pytest.mark.parametrize("num_draft_tokens", [0, 3])
def test_one_target_forward_a_round_over_the_batch(num_draft_tokens: int, sampling: Sampling) -> None:
    """Rows that run together share every forward: as many as the row with the most rounds has, each of K + 1 tokens.

    Beside those only the prompts are read, once and together, and nothing of a text is read again.
    """
    target, draft = toy_target(), similar_draft(SOME) if num_draft_tokens else None
    requests = make_requests(12, most_new=30)
    completions = decode(target, draft, requests, batch_size=12, num_draft_tokens=num_draft_tokens, sampling=sampling)
    bonus_tokens = [completion.writers.count(BONUS) for completion in completions]
    num_rounds = [len(c.rounds) if draft else bonus for c, bonus in zip(completions, bonus_tokens, strict=True)]
    prefill, *rounds = target.steps
    assert prefill == (12, max(len(request.tokens) for request in requests))
    assert [width for _, width in rounds] == [num_draft_tokens + 1] * max(num_rounds)
    assert [rows for rows, _ in rounds] == [sum(num > index for num in num_rounds) for index in range(max(num_rounds))]


def test_completions_arrive_as_they_finish() -> None:
    target, draft = toy_target(), similar_draft(SOME)
    requests = [Request("long", 0, (1,), 60), Request("short", 0, (1,), 2), Request("middle", 0, (1,), 12)]
    decoder = ChainDecoder(target, draft, sampling=SAMPLED, num_draft_tokens=2, batch_size=2)
    assert [c.request.prompt_id for c in decoder.run(requests)] == ["short", "middle", "long"]


def test_no_requests_no_completions() -> None:
    decoder = ChainDecoder(toy_target(), None, sampling=GREEDY, num_draft_tokens=0, batch_size=2)
    assert list(decoder.run([])) == []
