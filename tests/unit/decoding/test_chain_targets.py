"""Greedy decoding of real (tiny) models: token for token what the model itself generates without any cache."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from toy_models import ScriptedDraft

from lkspec.decoding.chain import ChainDecoder, Completion, Request
from lkspec.decoding.sampling import Sampling
from lkspec.drafts.base import Draft
from lkspec.drafts.eagle3 import Eagle3
from lkspec.targets.tiny import TinyTarget
from lkspec.targets.transformers import TransformersTarget
from lkspec.vocab import DraftVocab

KINDS = ["tiny_target", "tiny_gemma3", "tiny_gpt_oss"]
NUM_NEW = 20  # more than two windows of the sliding layers
NEAR_TIE = 1e-4
GREEDY = Sampling(temperature=0.0)


def make_prompts() -> list[tuple[int, ...]]:
    """Of different lengths, so that rows of a batch never share their positions; one is a single token."""
    generator = torch.Generator().manual_seed(0)
    return [tuple(torch.randint(0, 256, (num,), generator=generator).tolist()) for num in (5, 17, 1, 11, 9, 26)]


class Uncached:
    """The target's own greedy continuation by full forward passes, with the margin between its two best logits."""

    def __init__(self, target: TransformersTarget, prompts: Sequence[tuple[int, ...]], num_new: int) -> None:
        self.texts = [list(prompt) for prompt in prompts]
        self.margins: list[list[float]] = [[] for _ in prompts]
        with torch.inference_mode():
            for text, margins in zip(self.texts, self.margins, strict=True):
                for _ in range(num_new):
                    best = target.model(input_ids=torch.tensor([text])).logits[0, -1].topk(2)
                    margins.append(float(best.values[0] - best.values[1]))
                    text.append(int(best.indices[0]))

    def assert_same(self, prompts: Sequence[tuple[int, ...]], completions: Sequence[Completion]) -> None:
        """Equal up to the first near tie, which is printed."""
        for prompt, completion in zip(prompts, completions, strict=True):
            text, margins = next(
                known
                for known in zip(self.texts, self.margins, strict=True)
                if tuple(known[0][: len(prompt)]) == prompt
            )
            num_wanted = min(completion.request.max_new_tokens, len(text) - len(prompt))
            assert completion.finish_reason == "stop" or len(completion.tokens) == num_wanted
            expected = text[len(prompt) : len(prompt) + len(completion.tokens)]
            for place, (got, token) in enumerate(zip(completion.tokens, expected, strict=True)):
                if got != token:
                    print(f"{completion.request.prompt_id}: token {place} differs at a margin of {margins[place]:.1e}")
                    assert margins[place] < NEAR_TIE
                    break


@pytest.fixture(scope="module", params=KINDS)
def target(request) -> TinyTarget:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def uncached(target: TinyTarget) -> Uncached:
    return Uncached(target, make_prompts(), NUM_NEW)


def decode(target, draft: Draft | None, prompts, *, num_draft_tokens: int, batch_size: int, num_new=NUM_NEW):
    requests = [Request(f"p{i}", 0, prompt, num_new) for i, prompt in enumerate(prompts)]
    decoder = ChainDecoder(
        target, draft, sampling=GREEDY, num_draft_tokens=num_draft_tokens, batch_size=batch_size, seed=0
    )
    done = {c.request.prompt_id: c for c in decoder.run(requests)}
    return [done[r.prompt_id] for r in requests]


def random_eagle3(target: TinyTarget, *, truncated: bool) -> Eagle3:
    ids = torch.arange(0, target.vocab_size, 3) if truncated else torch.arange(target.vocab_size)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Eagle3(target.spec, DraftVocab(ids, target.vocab_size), num_depths=1)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_without_a_draft(target: TinyTarget, uncached: Uncached, batch_size: int) -> None:
    completions = decode(target, None, make_prompts(), num_draft_tokens=0, batch_size=batch_size)
    uncached.assert_same(make_prompts(), completions)


@pytest.mark.parametrize("truncated", [False, True], ids=["full", "truncated"])
@pytest.mark.parametrize("num_draft_tokens", [1, 3, 7])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_with_a_random_eagle3(
    target: TinyTarget, uncached: Uncached, batch_size: int, num_draft_tokens: int, truncated: bool
) -> None:
    draft = random_eagle3(target, truncated=truncated)
    prompts = make_prompts() if batch_size > 1 else make_prompts()[1:2]
    completions = decode(target, draft, prompts, num_draft_tokens=num_draft_tokens, batch_size=batch_size, num_new=8)
    uncached.assert_same(prompts, completions)
    assert any(c.rounds for c in completions)


@pytest.mark.parametrize(("num_draft_tokens", "batch_size"), [(1, 4), (3, 1), (3, 4), (7, 1), (7, 4)])
def test_with_drafts_of_every_quality(
    target: TinyTarget, uncached: Uncached, batch_size: int, num_draft_tokens: int
) -> None:
    """A random draft is hardly ever right; here rows accept 0 to K tokens in turn, at different times."""
    draft = ScriptedDraft(
        uncached.texts, target.vocab_size, lambda position, depth: position % 20 not in (0, 1, 3, 6, 10, 19)
    )
    completions = decode(target, draft, make_prompts(), num_draft_tokens=num_draft_tokens, batch_size=batch_size)
    uncached.assert_same(make_prompts(), completions)
    accepted = {made.accepted for completion in completions for made in completion.rounds}
    assert accepted >= set(range(min(num_draft_tokens, 3) + 1))


def test_end_of_text_while_other_rows_go_on(target: TinyTarget, uncached: Uncached) -> None:
    """A token of the first row's text ends it inside a round; the others must not notice."""
    eos = uncached.texts[0][5 + 8]
    cut = [_until(text[len(prompt) :], eos) for text, prompt in zip(uncached.texts, make_prompts(), strict=True)]
    assert len(cut[0]) <= 9 < max(map(len, cut))
    draft = ScriptedDraft(uncached.texts, target.vocab_size, lambda position, depth: position % 5 > 0)
    before, target.eos_ids = target.eos_ids, (eos,)
    try:
        completions = decode(target, draft, make_prompts(), num_draft_tokens=4, batch_size=6)
    finally:
        target.eos_ids = before
    uncached.assert_same(make_prompts(), completions)
    assert [len(c.tokens) for c in completions] == [len(text) for text in cut]
    assert [c.finish_reason for c in completions] == ["stop" if text[-1] == eos else "length" for text in cut]


def _until(tokens: list[int], eos: int) -> list[int]:
    return tokens[: tokens.index(eos) + 1] if eos in tokens else tokens


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt_oss"])
def test_the_context_limit(kind: str) -> None:
    """Rows fill the context to its last position and end there; one prompt leaves room for a single token."""
    limit = 24
    target = TinyTarget(kind=kind, num_layers=3, aux_layer_ids=(0, 1, 2), max_positions=limit, device="cpu")
    target.eos_ids = ()
    generator = torch.Generator().manual_seed(1)
    lengths = (limit - 1, limit - 2, limit - 3, 10)
    prompts = [tuple(torch.randint(0, 256, (num,), generator=generator).tolist()) for num in lengths]
    alone = [Uncached(target, [prompt], limit - len(prompt)) for prompt in prompts]
    texts = [reference.texts[0] for reference in alone]
    scripted = ScriptedDraft(texts, target.vocab_size, lambda position, depth: position % 6 > 0)
    for draft in (scripted, random_eagle3(target, truncated=False)):
        for num_draft_tokens, batch_size in [(7, 1), (7, 4), (2, 3)]:
            completions = decode(
                target, draft, prompts, num_draft_tokens=num_draft_tokens, batch_size=batch_size, num_new=1000
            )
            for prompt, reference, completion in zip(prompts, alone, completions, strict=True):
                reference.assert_same([prompt], [completion])
                assert completion.finish_reason == "length"
                assert len(prompt) + len(completion.tokens) == limit


def test_sampled_text_does_not_depend_on_the_batch(tiny_target: TinyTarget) -> None:
    draft = random_eagle3(tiny_target, truncated=True)
    requests = [Request(f"p{i}", i, prompt, 10) for i, prompt in enumerate(make_prompts())]
    runs = []
    for batch_size, order in [(1, 1), (4, 1), (6, -1)]:
        decoder = ChainDecoder(
            tiny_target, draft, sampling=Sampling(top_p=0.95), num_draft_tokens=3, batch_size=batch_size, seed=3
        )
        runs.append(sorted(decoder.run(requests[::order]), key=lambda c: c.request.prompt_id))
    assert runs[0] == runs[1] == runs[2]
    assert any(made.accepted for completion in runs[0] for made in completion.rounds)
