from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lkspec.data.chat import Encoded
from lkspec.data.dataset import EncodedStore, StepLoader, StepSampler, collate


def conversation(name, turn_lengths, *, tail=1):
    """Prompt of 2 tokens before each turn, ``tail`` unsupervised tokens at the end; token ids count from 1."""
    turns = []
    for turn, length in enumerate(turn_lengths, start=1):
        turns += [0, 0] + [turn] * length
    turns += [0] * tail
    return Encoded(name, list(range(1, len(turns) + 1)), turns)


conversations = st.builds(
    conversation, st.just("c"), st.lists(st.integers(1, 5), min_size=1, max_size=3), tail=st.integers(0, 2)
)
row_lists = st.lists(st.lists(conversations, min_size=1, max_size=3), min_size=1, max_size=3)


def brute_force_mask(rows, num_depths, width):
    """Contract 1, read literally: x_{t+1} .. x_{t+1+k} all in the same turn of the same conversation."""
    mask = torch.zeros(num_depths, len(rows), width, dtype=torch.bool)
    for b, row in enumerate(rows):
        owner = [(number, turn) for number, encoded in enumerate(row) for turn in encoded.turns]
        for k in range(1, num_depths + 1):
            for t in range(width):
                wanted = [owner[i] if i < len(owner) else None for i in range(t + 1, t + 2 + k)]
                first = wanted[0]
                mask[k - 1, b, t] = first is not None and first[1] > 0 and all(place == first for place in wanted)
    return mask


@given(rows=row_lists, num_depths=st.integers(1, 8))
def test_the_depth_mask_is_contract_1(rows, num_depths):
    batch = collate(rows)
    torch.testing.assert_close(
        batch.depth_mask(num_depths), brute_force_mask(rows, num_depths, batch.tokens.shape[1]), rtol=0, atol=0
    )


def test_the_depth_mask_by_hand():
    # x = p p a a a p p b b: depth 1 of anchors 1 and 2 lies in turn 1, of anchor 6 in turn 2; depth 2 of anchor 1.
    mask = collate([[conversation("c", [3, 2], tail=0)]]).depth_mask(2)[:, 0].int().tolist()
    assert mask == [[0, 1, 1, 0, 0, 0, 1, 0, 0], [0, 1, 0, 0, 0, 0, 0, 0, 0]]


@given(rows=row_lists)
def test_collate_keeps_every_token_once_and_pads_with_zeros(rows):
    batch = collate(rows)
    assert batch.ids == tuple(tuple("c" for _ in row) for row in rows)
    assert batch.is_packed == any(len(row) > 1 for row in rows)
    assert batch.num_supervised == sum(encoded.num_supervised for row in rows for encoded in row)
    width = batch.tokens.shape[1]
    assert width == max(2, *(sum(len(e.tokens) for e in row) for row in rows))
    for b, row in enumerate(rows):
        at, seen_turns = 0, set()
        for segment, encoded in enumerate(row, start=1):
            span = slice(at, at + len(encoded.tokens))
            assert batch.tokens[b, span].tolist() == encoded.tokens
            assert batch.positions[b, span].tolist() == list(range(len(encoded.tokens)))
            assert set(batch.segments[b, span].tolist()) == {segment}
            turns = batch.turns[b, span]
            assert (turns > 0).tolist() == [turn > 0 for turn in encoded.turns]
            own = set(turns.tolist()) - {0}
            assert len(own) == max(encoded.turns)
            assert not own & seen_turns
            seen_turns |= own
            at = span.stop
        for padded in (batch.tokens, batch.segments, batch.turns):
            assert not padded[b, at:].any()
        assert (batch.positions[b] < width).all()


def test_a_batch_without_conversations_counts_nothing():
    batch = collate([()])
    assert batch.tokens.shape == (1, 2)
    assert batch.ids == ((),)
    assert batch.num_supervised == 0
    assert not batch.depth_mask(3).any()
    assert not batch.is_packed


def make_store(lengths):
    store = EncodedStore()
    for index, length in enumerate(lengths):
        store.append(Encoded(f"c{index}", [index] * length, [0] + [1] * (length - 1), 1.0))
    return store


def test_the_store_gives_back_what_was_put_in():
    encoded = [conversation(f"c{n}", [n + 1, 2]) for n in range(5)]
    store = EncodedStore()
    for one in encoded:
        store.append(one)
    assert [store[i] for i in range(len(store))] == encoded
    assert store.lengths == [len(one.tokens) for one in encoded]
    supervised = [t for one in encoded for t, turn in zip(one.tokens, one.turns, strict=True) if turn]
    np.testing.assert_array_equal(store.supervised_tokens(), supervised)


def test_the_fingerprint_follows_ids_tokens_turns_and_borders():
    def fingerprint(*rows):
        store = EncodedStore()
        for row in rows:
            store.append(Encoded(*row))
        return store.fingerprint()

    base = fingerprint(("a", [1, 2], [0, 1]), ("b", [3], [1]))
    assert len(base) == 16
    assert int(base, 16) >= 0
    assert base == fingerprint(("a", [1, 2], [0, 1]), ("b", [3], [1]))
    others = {
        fingerprint(("a", [1, 2], [0, 1]), ("c", [3], [1])),
        fingerprint(("a", [1, 4], [0, 1]), ("b", [3], [1])),
        fingerprint(("a", [1, 2], [1, 1]), ("b", [3], [1])),
        fingerprint(("a", [1], [0]), ("b", [2, 3], [1, 1])),
    }
    assert len(others | {base}) == 5


LENGTHS = [3 + (7 * i) % 23 for i in range(40)]


def make_loader(*, num_workers=0, num_replicas=1, rank=0, accumulate=1, seed=0, pack=False, lengths=LENGTHS):
    sampler = StepSampler(
        lengths,
        max_tokens=64,
        seed=seed,
        packed_length=32 if pack else None,
        num_replicas=num_replicas,
        rank=rank,
        accumulate=accumulate,
    )
    return StepLoader(make_store(lengths), sampler, num_workers=num_workers)


def names(step):
    """The ids of a step's micro-batches."""
    return [batch.ids for batch in step]


def run(loader, num_epochs):
    """Names of every step of some epochs, each announced by set_epoch as Lightning does."""
    seen = []
    for epoch in range(num_epochs):
        loader.sampler.set_epoch(epoch)
        seen.append([names(step) for step in loader])
    return seen


@settings(max_examples=30)
@given(
    num_replicas=st.integers(1, 3),
    accumulate=st.integers(1, 3),
    epoch=st.integers(0, 2),
    seed=st.integers(0, 2),
    pack=st.booleans(),
)
def test_ranks_take_equal_disjoint_shares_and_only_the_tail_is_dropped(num_replicas, accumulate, epoch, seed, pack):
    loaders = [
        make_loader(num_replicas=num_replicas, rank=rank, accumulate=accumulate, seed=seed, pack=pack)
        for rank in range(num_replicas)
    ]
    seen, num_batches = [], 0
    for loader in loaders:
        loader.sampler.set_epoch(epoch)
        steps = list(loader)
        assert len(steps) == len(loader) == len(loaders[0])
        assert all(len(step) == accumulate for step in steps)
        for step in steps:
            for batch in step:
                num_batches += 1
                assert batch.tokens.numel() <= 64
                seen += [name for row in batch.ids for name in row]
    assert len(set(seen)) == len(seen)
    whole = make_loader(seed=seed, pack=pack)
    assert 0 <= len(whole) - num_batches < num_replicas * accumulate


@pytest.mark.parametrize("pack", [False, True])
def test_a_step_holds_the_same_rows_however_it_is_spread_over_ranks_and_micro_batches(pack):
    def rows_of_steps(num_replicas, accumulate):
        loaders = [
            make_loader(num_replicas=num_replicas, rank=rank, accumulate=accumulate, pack=pack)
            for rank in range(num_replicas)
        ]
        return [
            sorted(row for step in steps for batch in step for row in batch.ids) for steps in zip(*loaders, strict=True)
        ]

    assert rows_of_steps(4, 1) == rows_of_steps(1, 4) == rows_of_steps(2, 2)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_epochs_follow_one_another_with_or_without_set_epoch(num_workers):
    announced = run(make_loader(num_workers=num_workers), 3)
    loader = make_loader(num_workers=num_workers)
    assert [[names(step) for step in loader] for _ in range(3)] == announced
    assert announced[0] != announced[1]
    assert announced == run(make_loader(), 3)
    assert announced != run(make_loader(seed=1), 3)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resuming_after_any_step_goes_on_as_if_nothing_had_happened(num_workers):
    """The state counts steps that the consumer received, however far the workers are ahead."""
    num_epochs = 2
    whole = run(make_loader(), num_epochs)
    flat = [step for epoch in whole for step in epoch]
    steps_per_epoch = len(whole[0])
    assert steps_per_epoch > 8  # workers prefetch: an interrupted epoch must not lose those steps
    recorder = make_loader(num_workers=num_workers)
    states = [recorder.state_dict()]
    for epoch in range(num_epochs):
        recorder.sampler.set_epoch(epoch)
        for _ in recorder:
            states.append(recorder.state_dict())
    resumed = make_loader(num_workers=num_workers)  # one loader, resumed over and over: workers are kept
    for done, state in enumerate(states[:-1]):
        resumed.load_state_dict(state)
        rest = []
        for epoch in range(done // steps_per_epoch, num_epochs):
            resumed.sampler.set_epoch(epoch)
            assert len(resumed) == steps_per_epoch
            rest += [names(step) for step in resumed]
        assert rest == flat[done:], done


def test_a_state_saved_after_the_last_step_is_the_start_of_the_next_epoch():
    loader = make_loader()
    for _ in loader:
        pass
    state = loader.state_dict()
    assert (state["epoch"], state["step"]) == (1, 0)
    again = make_loader()
    again.load_state_dict(state)
    again.sampler.set_epoch(1)
    assert [names(step) for step in again] == run(make_loader(), 2)[1]


def test_an_epoch_left_early_starts_anew_under_the_next_number():
    loader = make_loader()
    iterator = iter(loader)
    for _ in range(3):
        next(iterator)
    loader.sampler.set_epoch(1)
    assert [names(step) for step in loader] == run(make_loader(), 2)[1]


def test_a_state_of_other_data_is_refused_inside_an_epoch_only():
    loader = make_loader()
    next(iter(loader))
    inside = loader.state_dict()
    with pytest.raises(ValueError, match=r"resume with the same data, data.seed"):
        make_loader(seed=1).load_state_dict(inside)
    with pytest.raises(ValueError, match="'num_steps'"):
        make_loader(accumulate=2).load_state_dict(inside)
    at_border = {**inside, "step": 0, "epoch": 3}
    other = make_loader(seed=1)
    other.load_state_dict(at_border)
    assert other.state_dict()["epoch"] == 3


def test_too_few_conversations_for_a_step_say_what_to_change():
    with pytest.raises(ValueError, match=r"make 1 micro-batches, but one step takes 2 ranks \* data.accumulate=3"):
        make_loader(num_replicas=2, accumulate=3, lengths=[4, 4])
