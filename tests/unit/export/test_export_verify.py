"""The comparison of q through the decoding path."""

from __future__ import annotations

import pytest
import torch
from helpers.draft_cases import CASES, half_vocab, make_draft
from torch import Tensor

from lkspec.drafts.base import Draft
from lkspec.export.verify import RealText, largest_q_difference
from lkspec.targets.tiny import TinyTarget
from lkspec.types import Batch, TargetStates

K = 3


@pytest.fixture(scope="module")
def text(tiny_target: TinyTarget) -> RealText:
    return RealText.answered_by(tiny_target, num_draft_tokens=K)


def test_the_text_is_a_prompt_and_its_greedy_answer(tiny_target: TinyTarget, text: RealText) -> None:
    prompt = tiny_target.tokenizer.decode(text.tokens[:-16])
    assert prompt.startswith("<|im_start|>user\n")
    assert prompt.endswith("<|im_end|>\n<|im_start|>assistant\n")
    length = len(text.tokens)
    batch = Batch(
        text.tokens[None], torch.arange(length)[None], torch.ones(1, length, dtype=torch.int64),
        torch.zeros(1, length, dtype=torch.int64), (("x",),),
    )  # fmt: skip
    states = tiny_target.states(batch)
    torch.testing.assert_close(text.states.last, states.last, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(text.states.aux, states.aux, rtol=1e-4, atol=1e-4)
    greedy = tiny_target.head.logits(states.last[0]).argmax(-1)
    answer = text.tokens[-16:]
    assert torch.equal(greedy[-17:-1], answer)
    assert text.anchors == [length - 5, length - 4, length - 3, length - 2]


def test_a_prompt_is_cut_to_the_context() -> None:
    target = TinyTarget(device="cpu", max_positions=64)
    text = RealText.answered_by(target, num_draft_tokens=7)
    assert len(text.tokens) == 64 - 7


@pytest.mark.parametrize("name", CASES)
def test_a_draft_proposes_what_it_proposes(name: str, tiny_target: TinyTarget, text: RealText) -> None:
    draft = make_draft(CASES[name], tiny_target.spec)
    assert largest_q_difference(draft, draft, text, num_draft_tokens=K) == 0.0


def q_by_unroll(draft: Draft, text: RealText, anchor: int, tokens: Tensor) -> Tensor:
    """q at each depth of one anchor, [K, V], from the training pass over the text up to it and the drafted tokens."""
    whole = torch.cat([text.tokens[: anchor + 2], tokens])
    length = len(whole)
    ones = torch.ones(1, length, dtype=torch.int64)
    batch = Batch(whole[None], torch.arange(length)[None], ones, ones, (("x",),))
    padded = [torch.zeros(1, length, part.shape[-1]) for part in (text.states.aux, text.states.last)]
    for part, source in zip(padded, (text.states.aux, text.states.last), strict=True):
        part[:, : anchor + 1] = source[:, : anchor + 1]
    hidden = draft.unroll(batch, TargetStates(*padded), K)[:, 0, anchor]
    logits = torch.stack([draft.head(k).logits(hidden[k - 1]) for k in range(1, K + 1)])
    return draft.vocab.expand(logits.double().softmax(-1))


@pytest.mark.parametrize("name", ["eagle3", "medusa", "mlp_tied", "mtp"])
def test_the_largest_difference_is_that_of_the_training_pass(
    name: str, tiny_target: TinyTarget, text: RealText
) -> None:
    """Anchor by anchor, along the tokens that the first draft finds most probable."""
    vocab = half_vocab(tiny_target.vocab_size)
    first, second = (make_draft(CASES[name], tiny_target.spec, vocab, seed=seed) for seed in (1, 2))
    largest = 0.0
    with torch.no_grad():
        for anchor in text.anchors:
            tokens = torch.zeros(0, dtype=torch.int64)
            for depth in range(K):
                q = q_by_unroll(first, text, anchor, torch.cat([tokens, torch.zeros(K - depth, dtype=torch.int64)]))
                tokens = torch.cat([tokens, q[depth].argmax()[None]])
            ours, theirs = (q_by_unroll(draft, text, anchor, tokens) for draft in (first, second))
            largest = max(largest, float((ours - theirs).abs().max()))
    assert largest > 1e-3
    assert largest_q_difference(first, second, text, num_draft_tokens=K) == pytest.approx(largest, rel=1e-3)


def test_a_nan_is_no_equality(tiny_target: TinyTarget, text: RealText) -> None:
    first, second = (make_draft(CASES["medusa"], tiny_target.spec) for _ in range(2))
    with torch.no_grad():
        second.head(2).weight[3] = torch.nan
    assert not largest_q_difference(first, second, text, num_draft_tokens=K) <= 1.0


def test_a_smaller_vocabulary_differs(tiny_target: TinyTarget, text: RealText) -> None:
    whole = make_draft(CASES["medusa"], tiny_target.spec)
    vocab = half_vocab(tiny_target.vocab_size)
    half = make_draft(CASES["medusa"], tiny_target.spec, vocab)
    with torch.no_grad():
        for depth in range(1, K + 1):
            half.head(depth).weight.copy_(whole.head(depth).weight[vocab.ids])
    assert largest_q_difference(half, whole, text, num_draft_tokens=K) > 1e-3
