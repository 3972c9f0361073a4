"""Prompts that are read together: in which groups, and that no text depends on them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from helpers.draft_cases import CASES, half_vocab, make_draft
from toy_models import GREEDY, SAMPLED, SOME, V, decode, decode_one, make_requests, similar_draft, toy_target

from lkspec.decoding.chain import Completion, Request
from lkspec.decoding.sampling import Sampling
from lkspec.drafts.base import Draft
from lkspec.targets.tiny import TinyTarget

LENGTHS = (3, 40, 1, 17, 90, 5, 23, 24, 2, 61, 8, 1, 33, 12, 70, 6, 4, 28)  # one token to eleven windows


def requests_of(lengths: Sequence[int], num_new: Sequence[int], vocab_size: int) -> list[Request]:
    generator = torch.Generator().manual_seed(0)
    prompts = [tuple(torch.randint(0, vocab_size, (num,), generator=generator).tolist()) for num in lengths]
    return [Request(f"p{i}", 0, prompt, num) for i, (prompt, num) in enumerate(zip(prompts, num_new, strict=True))]


# --- groups -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lengths", "prefills"),
    [
        ((5, 9, 1, 7), [(4, 9)]),
        ((30, 1, 14, 13, 3), [(2, 30), (3, 13)]),  # 16 slots of padding cost less than a forward pass, 17 do not
        ((2, 300, 290), [(1, 300), (1, 290), (1, 2)]),
        ((60,) * 9, [(4, 60), (4, 60), (1, 60)]),  # 256 tokens a group
        ((7,), [(1, 7)]),
    ],
    ids=["one", "two-lengths", "long", "many", "alone"],
)
def test_prompts_of_similar_length_are_read_together(lengths: tuple[int, ...], prefills: list[tuple[int, int]]) -> None:
    target = toy_target()
    decode(target, None, requests_of(lengths, [1] * len(lengths), V), batch_size=16)
    assert target.steps == prefills


@pytest.mark.parametrize("batch_size", [3, 16])
def test_prompts_cost_fewer_forwards_than_there_are(tiny_target: TinyTarget, monkeypatch, batch_size: int) -> None:
    steps: list[tuple[int, ...]] = []
    step = tiny_target.step
    monkeypatch.setattr(tiny_target, "step", lambda tokens, *rest: steps.append(tokens.shape) or step(tokens, *rest))
    decode(tiny_target, None, requests_of(LENGTHS, [1] * len(LENGTHS), 256), batch_size=batch_size, sampling=GREEDY)
    assert sum(rows for rows, _ in steps) == len(LENGTHS)
    assert len(steps) < (0.5 if batch_size == 16 else 0.8) * len(LENGTHS)


def test_rows_that_finish_together_are_refilled_together_and_dropped_together() -> None:
    """Eleven texts of three tokens in four slots: all rows finish in the same round, the last three leave together."""
    target, requests = toy_target(), requests_of((3,) * 11, (3,) * 11, V)
    decode(target, None, requests, batch_size=4)
    assert target.steps == [(4, 3), (4, 1), (4, 1)] * 2 + [(3, 3), (3, 1), (3, 1)]


def test_some_are_refilled_some_are_dropped_in_one_round() -> None:
    """Three rows finish together with one request waiting: it takes a slot, and the last row moves into another."""
    target, draft = toy_target(), similar_draft(SOME)
    requests = requests_of((2, 5, 3, 1, 4, 6), (2, 9, 2, 2, 7, 5), V)
    completions = decode(target, draft, requests, batch_size=5, num_draft_tokens=2, seed=4)
    for request, got in zip(requests, completions, strict=True):
        tokens, writers, reason, rounds = decode_one(target, draft, request, SAMPLED, 2, seed=4)
        assert (got.tokens, got.writers, got.finish_reason) == (tuple(tokens), tuple(writers), reason)
        assert got.rounds == tuple(rounds)
    assert [rows for rows, width in target.steps if width == 3][:2] == [5, 3]


def test_texts_that_the_prefill_ends_are_refilled_before_the_next_round() -> None:
    target = toy_target()
    decode(target, None, requests_of((2,) * 6, (1, 1, 3, 1, 3, 1), V), batch_size=3)
    assert target.steps == [(3, 2), (2, 2), (1, 2), (2, 1), (2, 1)]


# --- texts --------------------------------------------------------------------------------------------------------


# Every draft on a plain target; the others differ in what the cache lets a query see, which MTP's layer shares.
PAIRS = [("tiny_target", None), ("tiny_target", "eagle3"), ("tiny_target", "mtp"), ("tiny_gemma3", "mtp")]
SLOW_PAIRS = [pytest.param("tiny_gpt_oss", "mtp", marks=pytest.mark.slow)]


def draft_of(name: str | None, target: TinyTarget) -> Draft | None:
    if name is None:
        return None
    return make_draft(CASES[name], target.spec, half_vocab(target.vocab_size) if name == "eagle3" else None)


def texts_and_rounds(completions: Sequence[Completion]) -> list[tuple]:
    return [(c.tokens, c.writers, c.finish_reason, c.rounds) for c in completions]


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(top_p=0.95)], ids=["T0", "T1"])
@pytest.mark.parametrize(("target_name", "name"), [*PAIRS, *SLOW_PAIRS])
def test_texts_do_not_depend_on_who_is_read_together(
    request: pytest.FixtureRequest, target_name: str, name: str | None, sampling: Sampling
) -> None:
    """Alone, three at a time and nearly all at once; many texts end in the same round and are replaced together."""
    target = request.getfixturevalue(target_name)
    draft = draft_of(name, target)
    requests = requests_of(LENGTHS, [(6, 2, 6)[i % 3] for i in range(len(LENGTHS))], 256)
    runs = [
        texts_and_rounds(decode(target, draft, requests, batch_size=size, sampling=sampling, seed=5))
        for size in (1, 3, 16)
    ]
    assert runs[0] == runs[1] == runs[2]
    assert any(rounds for *_, rounds in runs[0]) == (draft is not None)


@pytest.mark.parametrize("batch_size", [3, 16])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["T0", "T1"])
def test_padding_never_enters_a_text(sampling: Sampling, batch_size: int) -> None:
    """The toy target sums up all that it sees, to the last position of its context."""
    target = toy_target(max_positions=40)
    draft = similar_draft(SOME, checked_below=38)
    requests = [*make_requests(12, longest=24), *requests_of((39, 38, 37, 30, 15, 1), (9, 9, 9, 20, 9, 60), V)]
    requests = [Request(f"q{i}", 0, request.tokens, request.max_new_tokens) for i, request in enumerate(requests)]
    completions = decode(target, draft, requests, batch_size=batch_size, sampling=sampling, seed=6)
    for request, got in zip(requests, completions, strict=True):
        tokens, writers, reason, _ = decode_one(target, draft, request, sampling, 3, seed=6)
        assert (got.tokens, got.writers, got.finish_reason) == (tuple(tokens), tuple(writers), reason)
