"""The cached ``step`` against a fresh pass over the whole text, in every way that decoding uses it."""

from __future__ import annotations

import pytest
import torch
from target_batches import KINDS, alone, assert_states_close, padded, random_tokens
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM

from lkspec.nn.kv_cache import PositionCache
from lkspec.targets.tiny import TinyTarget, byte_tokenizer
from lkspec.targets.transformers import TransformersTarget
from lkspec.types import TargetStates

NUM_TOKENS = 24  # three windows of the sliding layers


def one_window_mistral() -> TransformersTarget:
    """Every layer slides, and the config names no layer types."""
    config = MistralConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=264,
        sliding_window=6,
        eos_token_id=257,
        initializer_range=0.2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MistralForCausalLM(config)
    return TransformersTarget.from_model(model, byte_tokenizer(), name="mistral", device="cpu")


@pytest.fixture(scope="module", params=[*KINDS, ("mistral", "sdpa")], ids=lambda p: f"{p[0]}-{p[1]}")
def target(request) -> TransformersTarget:
    kind, attention = request.param
    if kind == "mistral":
        return one_window_mistral()
    return TinyTarget(kind=kind, attn_implementation=attention, device="cpu")


def step(target: TransformersTarget, cache: PositionCache, rows: list[Tensor], starts: list[int]) -> TargetStates:
    """Reads equally many tokens a row, each from its own position on."""
    tokens = torch.stack(rows)
    positions = torch.tensor(starts)[:, None] + torch.arange(tokens.shape[1])
    return target.step(tokens, positions, cache)


def row_of(states: TargetStates, row: int) -> TargetStates:
    return TargetStates(states.aux[row], states.last[row])


def cut(states: TargetStates, start: int, stop: int) -> TargetStates:
    return TargetStates(states.aux[start:stop], states.last[start:stop])


@pytest.mark.parametrize("sizes", [[1] * NUM_TOKENS, [10, 1, 5, 8], [NUM_TOKENS], [3] * 8])
def test_tokens_in_any_chunks_equal_the_whole_text(target, sizes):
    texts = random_tokens(2, NUM_TOKENS)
    cache = target.new_cache(2)
    pieces, start = [], 0
    for size in sizes:
        pieces.append(step(target, cache, [t[start : start + size] for t in texts], [start] * 2))
        start += size
    got = TargetStates(torch.cat([p.aux for p in pieces], 1), torch.cat([p.last for p in pieces], 1))
    for row, text in enumerate(texts):
        assert_states_close(row_of(got, row), alone(target, text))


def test_rows_at_different_positions(target):
    """Rows that accepted different lengths: each goes on at its own position."""
    texts = random_tokens(3, NUM_TOKENS, seed=1)
    cache = target.new_cache(3)
    step(target, cache, [t[:6] for t in texts], [0, 0, 0])
    starts = [6, 6, 6]
    for moved in ([1, 4, 2], [3, 1, 4], [4, 4, 1]):
        got = step(target, cache, [t[s : s + 4] for t, s in zip(texts, starts, strict=True)], starts)
        for row, text in enumerate(texts):
            assert_states_close(row_of(got, row), cut(alone(target, text), starts[row], starts[row] + 4))
        starts = [s + m for s, m in zip(starts, moved, strict=True)]


def test_rejected_positions_are_overwritten(target):
    """K + 1 = 5 tokens are read, all behind the first ``accepted + 1`` are wrong and are read over the next time."""
    text = random_tokens(NUM_TOKENS, seed=2)
    wrong = (text + 1) % 256
    cache = target.new_cache(1)
    step(target, cache, [text[:5]], [0])
    start, last = 5, None
    for accepted in (0, 2, 4, 1, 0, 3):
        right = accepted + 1
        drafted = torch.cat([text[start : start + right], wrong[start + right : start + 5]])
        last = step(target, cache, [drafted], [start])
        expected = cut(alone(target, text[: start + right]), start, start + right)
        assert_states_close(cut(row_of(last, 0), 0, right), expected)
        start += right
    assert start == 5 + 10 + 6


def test_going_back_far_equals_a_fresh_computation(target):
    text, other = random_tokens(2, NUM_TOKENS, seed=3)
    cache = target.new_cache(1)
    step(target, cache, [text], [0])
    spliced = torch.cat([text[:4], other[4:20]])
    got = step(target, cache, [other[4:20]], [4])  # rows past 20 still hold the old text and must not be seen
    assert_states_close(row_of(got, 0), cut(alone(target, spliced), 4, 20))


def test_copied_row_goes_on_like_its_source(target):
    """Admitting a prompt: it is read in a cache of its own and copied into a free row of a running one."""
    running, admitted = random_tokens(2, NUM_TOKENS, seed=4)
    cache, prefill = target.new_cache(2), target.new_cache(1)
    step(target, cache, [running[:9], running[:9]], [0, 0])
    step(target, prefill, [admitted[:15]], [0])
    cache.copy_rows(torch.tensor([1]), prefill, 15)
    got = step(target, cache, [running[9:12], admitted[15:18]], [9, 15])
    assert_states_close(row_of(got, 0), cut(alone(target, running), 9, 12))
    assert_states_close(row_of(got, 1), cut(alone(target, admitted), 15, 18))


def test_copy_into_an_empty_cache(target):
    text = random_tokens(NUM_TOKENS, seed=5)
    cache, prefill = target.new_cache(2), target.new_cache(1)
    step(target, prefill, [text[:10]], [0])
    for row in (0, 1):
        cache.copy_rows(torch.tensor([row]), prefill, 10)
    got = step(target, cache, [text[10:12], text[10:12]], [10, 10])
    for row in (0, 1):
        assert_states_close(row_of(got, row), cut(alone(target, text), 10, 12))


def test_kept_rows_go_on(target):
    texts = random_tokens(4, NUM_TOKENS, seed=6)
    cache = target.new_cache(4)
    step(target, cache, [t[:10] for t in texts], [0] * 4)
    cache.keep([3, 1])
    got = step(target, cache, [texts[3][10:13], texts[1][8:11]], [10, 8])
    assert_states_close(row_of(got, 0), cut(alone(target, texts[3]), 10, 13))
    assert_states_close(row_of(got, 1), cut(alone(target, texts[1]), 8, 11))


def test_step_agrees_with_states(target):
    texts = random_tokens(2, NUM_TOKENS, seed=7)
    stepped = step(target, target.new_cache(2), list(texts), [0, 0])
    assert_states_close(stepped, target.states(padded(list(texts))))
