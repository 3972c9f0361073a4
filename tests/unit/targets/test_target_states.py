from __future__ import annotations

import pytest
import torch
from target_batches import KINDS, alone, assert_states_close, packed, padded, random_tokens

from lkspec.targets.tiny import TinyTarget
from lkspec.types import TargetStates


@pytest.fixture(scope="module", params=KINDS, ids=lambda p: f"{p[0]}-{p[1]}")
def target(request) -> TinyTarget:
    kind, attention = request.param
    return TinyTarget(kind=kind, attn_implementation=attention, device="cpu")


def row_of(states: TargetStates, row: int, start: int, stop: int) -> TargetStates:
    return TargetStates(states.aux[row, start:stop], states.last[row, start:stop])


def test_auxiliary_states_enter_layers_2_half_and_third_from_last(target):
    tokens = random_tokens(1, 20)
    output = target.model(tokens, output_hidden_states=True)
    states = target.states(padded([tokens[0]]))
    assert target.aux_layer_ids == (2, 4, 5)
    assert output.hidden_states[0].equal(target._decoder.embed_tokens(tokens))  # index i is what enters layer i
    for part, layer in enumerate((2, 4, 5)):
        torch.testing.assert_close(states.aux[..., 64 * part : 64 * (part + 1)], output.hidden_states[layer])


def test_last_state_times_head_is_the_models_logits(target):
    tokens = random_tokens(2, 20)
    logits = target.model(tokens).logits
    torch.testing.assert_close(target.head.logits(target.states(padded(list(tokens))).last), logits)
    assert target.vocab_size == logits.shape[-1] == 264


def test_right_padding_changes_nothing(target):
    rows = [random_tokens(length, seed=length) for length in (5, 30, 17)]
    states = target.states(padded(rows))
    for i, row in enumerate(rows):
        assert_states_close(row_of(states, i, 0, len(row)), alone(target, row))


def test_packed_conversations_equal_separate_ones(target):
    rows = [
        [random_tokens(12, seed=1), random_tokens(3, seed=2), random_tokens(19, seed=3)],
        [random_tokens(25, seed=4), random_tokens(4, seed=5)],
    ]
    batch = packed(rows)
    assert batch.is_packed
    states = target.states(batch)
    assert torch.isfinite(states.last).all()
    for i, row in enumerate(rows):
        start = 0
        for part in row:
            assert_states_close(row_of(states, i, start, start + len(part)), alone(target, part))
            start += len(part)


def test_hooks_are_removed(target):
    target.states(padded([random_tokens(5)]))
    assert all(not layer._forward_pre_hooks for layer in target._decoder.layers)


def test_explicit_auxiliary_layers():
    target = TinyTarget(num_layers=3, aux_layer_ids=(0, 2), device="cpu")
    tokens = random_tokens(1, 6)
    entered = target.model(tokens, output_hidden_states=True).hidden_states
    states = target.states(padded([tokens[0]]))
    torch.testing.assert_close(states.aux, torch.cat([entered[0], entered[2]], -1))


@pytest.mark.parametrize("num_layers", [1, 4, 6])
def test_colliding_default_auxiliary_layers_are_refused(num_layers):
    with pytest.raises(ValueError, match=rf"collide for {num_layers} layers.*Set target.aux_layer_ids"):
        TinyTarget(num_layers=num_layers, device="cpu")


@pytest.mark.parametrize("num_layers", [7, 9])
def test_default_auxiliary_layers_are_distinct(num_layers):
    assert TinyTarget(num_layers=num_layers, device="cpu").aux_layer_ids == (2, num_layers // 2, num_layers - 3)


@pytest.mark.parametrize("ids", [(2, 2, 4), (4, 2, 5), (0, 4, 8), (-1, 2, 3)])
def test_bad_explicit_auxiliary_layers_are_refused(ids):
    with pytest.raises(ValueError, match=r"distinct, ascending and in \[0, 8\)"):
        TinyTarget(aux_layer_ids=ids, device="cpu")
