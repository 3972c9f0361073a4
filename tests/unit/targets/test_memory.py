from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lkspec.targets.memory import RememberedStates
from lkspec.types import Batch, HeadSummary, TargetStates, stack_rows, text_key

PLENTY = 1.0
NUM_STATES = 4 * 64  # numbers a token: three auxiliary states and the last one, H = 64


class CountingTarget:
    """Passes batches on and notes what was computed."""

    def __init__(self, target) -> None:
        self.target = target
        self.computed: list[tuple[tuple[str, ...], ...]] = []

    def states(self, batch: Batch) -> TargetStates:
        self.computed.append(batch.ids)
        return self.target.states(batch)


@pytest.fixture
def counting(tiny_target) -> CountingTarget:
    return CountingTarget(tiny_target)


def text(length: int, *, seed: int) -> Tensor:
    return torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed))


def rows_of(*rows: list[tuple[str, Tensor]]) -> Batch:
    """A batch of rows of named conversations, padded on the right."""
    parts = [[tokens for _, tokens in row] for row in rows]
    segments = stack_rows(torch.cat([torch.full_like(t, i + 1) for i, t in enumerate(row)]) for row in parts)
    return Batch(
        tokens=stack_rows(torch.cat(row) for row in parts),
        positions=stack_rows(torch.cat([torch.arange(len(t)) for t in row]) for row in parts),
        segments=segments,
        turns=segments,
        ids=tuple(tuple(name for name, _ in row) for row in rows),
    )


A, B, C, D = (text(length, seed=length) for length in (12, 30, 7, 19))
PADDED = rows_of([("a", A)], [("b", B)], [("c", C)])
PACKED = rows_of([("a", A), ("c", C), ("d", D)], [("b", B), ("c", C)])


def assert_same_states(got: TargetStates, expected: TargetStates, batch: Batch, tolerance: float = 1e-6) -> None:
    """Equal where there is text (relative to the largest entry); what padding holds is nobody's business."""
    for ours, theirs in ((got.aux, expected.aux), (got.last, expected.last)):
        assert ours.shape == theirs.shape
        real = batch.segments > 0
        assert float((ours[real] - theirs[real]).abs().max() / theirs[real].abs().max()) < tolerance


@pytest.mark.parametrize("batch", [PADDED, PACKED], ids=["padded", "packed"])
def test_states_are_the_targets(tiny_target, batch):
    remembered = RememberedStates(tiny_target.states, PLENTY)
    expected = tiny_target.states(batch)
    assert_same_states(remembered(batch), expected, batch)
    assert_same_states(remembered(batch), expected, batch)  # from memory


def test_what_was_seen_is_not_computed_again(counting):
    remembered = RememberedStates(counting.states, PLENTY)
    first = remembered(PADDED)
    assert counting.computed == [(("a",),), (("b",),), (("c",),)]
    second = remembered(PADDED)
    assert len(counting.computed) == 3
    assert second.aux.equal(first.aux)
    assert second.last.equal(first.last)
    remembered(PACKED)  # shuffled into other batches the next epoch: only d is new
    assert counting.computed[3:] == [(("d",),)]


def test_states_do_not_depend_on_the_rest_of_the_batch(tiny_target):
    packed = RememberedStates(tiny_target.states, PLENTY)(PACKED)
    alone = RememberedStates(tiny_target.states, PLENTY)(rows_of([("d", D)]))
    start = len(A) + len(C)
    assert packed.last[0, start : start + len(D)].equal(alone.last[0])
    assert packed.aux[0, start : start + len(D)].equal(alone.aux[0])


def test_one_id_with_two_texts_is_not_mixed_up(counting):
    remembered = RememberedStates(counting.states, PLENTY)
    same_length = text(len(A), seed=99)
    for tokens in (A, same_length, A[:-1], A, same_length):
        batch = rows_of([("a", tokens)])
        assert_same_states(remembered(batch), counting.target.states(batch), batch)
    assert len(counting.computed) == 3


def test_a_rank_that_has_run_out_passes_a_batch_without_text(tiny_target):
    nothing = torch.zeros(1, 2, dtype=torch.int64)
    states = RememberedStates(tiny_target.states, PLENTY)(Batch(nothing, nothing, nothing, nothing, ((),)))
    assert states.last.shape == (1, 2, 64)
    assert states.aux.shape == (1, 2, 3 * 64)


def test_once_full_the_rest_is_computed_each_time(counting):
    room = (len(A) + len(C)) * NUM_STATES * 4  # bytes in float32: a fits, b does not, c just does
    remembered = RememberedStates(counting.states, (room + 0.5) / 1e9)
    expected = counting.target.states(PADDED)
    for _ in range(3):
        assert_same_states(remembered(PADDED), expected, PADDED)
    assert counting.computed == [(("a",),), (("b",),), (("c",),), (("b",),), (("b",),)]
    remembered(rows_of([("a", A)]))
    assert len(counting.computed) == 5


def test_without_memory_whole_batches_are_computed(counting):
    remembered = RememberedStates(counting.states, 0)
    for _ in range(2):
        assert_same_states(remembered(PACKED), counting.target.states(PACKED), PACKED, tolerance=1e-12)
    assert counting.computed == [PACKED.ids, PACKED.ids]


@pytest.mark.parametrize("made_inside", [False, True], ids=["batch made outside", "batch made inside"])
def test_states_remembered_in_inference_mode_serve_training(counting, made_inside):
    remembered = RememberedStates(counting.states, PLENTY)
    with torch.inference_mode():
        batch = PACKED if not made_inside else replace(PACKED, tokens=PACKED.tokens + 0, segments=PACKED.segments + 0)
        remembered(batch)
    assert len(counting.computed) == 4
    states = remembered(PACKED)
    assert len(counting.computed) == 4
    assert not states.last.is_inference()
    weight = torch.ones(64, requires_grad=True)
    (states.last @ weight).sum().backward()  # saves the states for backward, which inference tensors refuse
    expected = counting.target.states(PACKED).last[PACKED.segments > 0].sum(0)
    torch.testing.assert_close(weight.grad, expected, rtol=1e-4, atol=1e-4)


def test_what_a_caller_writes_into_the_states_is_not_remembered(tiny_target):
    remembered = RememberedStates(tiny_target.states, PLENTY)
    batch = rows_of([("a", A)])
    expected = remembered(batch).last.clone()
    remembered(batch).last.zero_()
    assert remembered(batch).last.equal(expected)


def test_a_conversation_is_always_computed_in_the_same_company(counting):
    together = rows_of([("a", A)], [("c", C)])
    company = {text_key(A): together, text_key(C): together}
    remembered = RememberedStates(counting.states, PLENTY, company=company.get)
    expected = counting.target.states(PADDED)
    assert_same_states(remembered(PADDED), expected, PADDED)
    assert counting.computed == [together.ids, (("b",),)]  # c came with a
    remembered(rows_of([("c", C)]))
    assert len(counting.computed) == 2
    other_order = RememberedStates(counting.states, PLENTY, company=company.get)
    first = other_order(rows_of([("c", C)])).last[0]
    assert first.equal(remembered(rows_of([("c", C)])).last[0])


def test_a_full_memory_computes_without_company(counting):
    together = rows_of([("a", A)], [("b", B)])
    company = {text_key(A): together, text_key(B): together}
    room = len(A) * NUM_STATES * 4
    remembered = RememberedStates(counting.states, (room + 0.5) / 1e9, company=company.get)
    for _ in range(2):
        remembered(rows_of([("a", A)]))
        remembered(rows_of([("b", B)]))
    assert counting.computed == [together.ids, (("b",),), (("b",),)]


def test_auxiliary_states_are_left_out_where_nobody_reads_them(counting):
    remembered = RememberedStates(counting.states, (len(A) * 64 * 4 + 0.5) / 1e9, with_aux=False)
    batch = rows_of([("a", A)])
    for _ in range(2):
        states = remembered(batch)
        assert states.aux.shape == (1, len(A), 0)
        assert states.last.equal(counting.target.states(batch).last)
    assert len(counting.computed) == 1


def test_what_the_logits_come_to_is_remembered_too(counting):
    made = []

    def summarise(last: Tensor) -> HeadSummary:
        made.append(last.shape)
        return HeadSummary(last.sum(-1), last.argmax(-1))

    together = rows_of([("a", A)], [("b", B)])
    company = {text_key(A): together, text_key(B): together}
    remembered = RememberedStates(counting.states, PLENTY, company=company.get, summarise=summarise)
    for _ in range(2):
        states = remembered(PACKED)
    assert made == [(2, len(B), 64), (1, len(C), 64), (1, len(D), 64)]
    text = PACKED.segments > 0
    assert states.summary is not None
    assert states.summary.log_normaliser[text].allclose(states.last.sum(-1)[text], atol=1e-4)
    assert states.summary.argmax[text].equal(states.last.argmax(-1)[text])


def test_a_summary_that_is_there_is_not_made_again(counting):
    def states_of(batch: Batch) -> TargetStates:
        states = counting.states(batch)
        return replace(states, summary=HeadSummary(states.last[..., 0], batch.tokens))

    remembered = RememberedStates(states_of, PLENTY, summarise=lambda last: pytest.fail("made again"))
    states = remembered(PADDED)
    assert states.summary is not None
    assert states.summary.argmax.equal(PADDED.tokens)
