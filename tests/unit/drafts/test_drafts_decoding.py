"""Contract 2: decoding computes the q that training computes, round by round and depth by depth.

Every round of a batched decoding is recorded: what the draft's cache says the text is, what was drafted, and the draft
logits of each depth. The same prefix and drafted tokens are then fed to ``unroll`` as if they were training text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from helpers.draft_cases import Case, half_vocab, make_draft
from torch import Tensor

from lkspec.decoding.chain import ChainDecoder, Completion, Request
from lkspec.decoding.sampling import Sampling
from lkspec.drafts.base import Draft
from lkspec.nn.kv_cache import PositionCache
from lkspec.targets.tiny import TinyTarget
from lkspec.types import Batch, DraftSampler, FreshStates, TargetStates, stack_rows
from lkspec.vocab import DraftVocab

TOLERANCE = 1e-5
K = 3
FIRST = 65  # x_0 of every prompt: a draft's cache does not hold it
WRONG = {0, 1, 3, 6, 10, 19}  # places of the generated text, mod 20, at which a forced draft is wrong


@dataclass(frozen=True)
class Recorded:
    """One round of one row: the text so far (its last token is x_{t+1}), the drafted tokens, logits [K, D]."""

    text: tuple[int, ...]
    drafted: tuple[int, ...]
    logits: Tensor


class TextCache(PositionCache):
    """A draft's cache beside the tokens that it was shown: rows move with their text."""

    def __init__(self, num_rows: int) -> None:
        super().__init__(num_rows)
        self.text = PositionCache(num_rows)

    def copy_rows(self, rows: Tensor, source: PositionCache, length: int) -> None:
        super().copy_rows(rows, source, length)
        assert isinstance(source, TextCache)
        self.text.copy_rows(rows, source.text, length)

    def keep(self, rows: list[int]) -> None:
        super().keep(rows)
        self.text.keep(rows)


class RecordingDraft(Draft):
    """Wraps a draft and remembers its rounds.

    ``force`` chooses the drafted token (target id) from the text and what is drafted so far; None leaves the sample.
    """

    def __init__(self, draft: Draft, force: Callable[[tuple[int, ...]], int] | None = None) -> None:
        super().__init__(draft.vocab, draft.num_depths, max_depths=draft.max_depths)
        self.draft, self.force = draft, force
        self.records: list[Recorded] = []

    def new_cache(self, num_rows: int) -> TextCache:
        return TextCache(num_rows)

    def observe(self, cache: PositionCache, fresh: FreshStates) -> Tensor:
        states = self.draft.observe(cache, fresh)
        self._remember(cache, fresh)
        return states

    def propose(self, cache: PositionCache, fresh: FreshStates, sample: DraftSampler, num_draft_tokens: int) -> Tensor:
        texts = self._remember(cache, fresh)
        logits: list[Tensor] = []
        drafted: list[list[int]] = [[] for _ in texts]

        def recording(depth_logits: Tensor) -> Tensor:
            logits.append(depth_logits.clone())
            chosen = sample(depth_logits)
            if self.force is not None:
                forced = [self.force((*text, *tokens)) for text, tokens in zip(texts, drafted, strict=True)]
                chosen = self.vocab.to_draft(torch.tensor(forced))
                assert bool((chosen >= 0).all())
            for tokens, token in zip(drafted, self.vocab.to_target(chosen).tolist(), strict=True):
                tokens.append(token)
            return chosen

        proposed = self.draft.propose(cache, fresh, recording, num_draft_tokens)
        assert proposed.tolist() == drafted
        for row, text in enumerate(texts):
            self.records.append(Recorded(text, tuple(drafted[row]), torch.stack([step[row] for step in logits])))
        return proposed

    def _remember(self, cache: PositionCache, fresh: FreshStates) -> list[tuple[int, ...]]:
        assert isinstance(cache, TextCache)
        cache.text.at(fresh.positions)
        tokens = fresh.next_tokens.double()[:, None, :, None]
        seen = cache.text.update(tokens, tokens, 0)[0][:, 0, :, 0].long()
        anchors = fresh.positions.gather(1, fresh.lengths[:, None] - 1)[:, 0].tolist()
        return [(FIRST, *seen[row, : anchor + 1].tolist()) for row, anchor in enumerate(anchors)]


def make_requests(num: int, num_new: int) -> list[Request]:
    generator = torch.Generator().manual_seed(0)
    lengths = [3, 11, 6, 1, 8][:num]
    prompts = [(FIRST, *torch.randint(0, 256, (n,), generator=generator).tolist()) for n in lengths]
    return [Request(f"p{i}", 0, prompt, num_new) for i, prompt in enumerate(prompts)]


def training_logits(draft: Draft, target: TinyTarget, texts: Sequence[Sequence[int]], num_depths: int) -> Tensor:
    """What training computes for these texts: draft logits [K, B, T, D]."""
    tokens = stack_rows(torch.tensor(text) for text in texts)
    segments = stack_rows(torch.ones(len(text), dtype=torch.int64) for text in texts)
    positions = torch.arange(tokens.shape[1]).expand_as(tokens) * segments
    batch = Batch(tokens, positions, segments, segments, tuple((f"t{i}",) for i in range(len(texts))))
    with torch.inference_mode():
        hidden = draft.unroll(batch, target.states(batch), num_depths)
        return torch.stack([draft.head(k).logits(hidden[k - 1]) for k in range(1, num_depths + 1)])


def assert_training_agrees(draft: Draft, target: TinyTarget, records: Sequence[Recorded]) -> None:
    """Each round as a text of its own: prefix, then drafted tokens, whatever became of them."""
    num_depths = len(records[0].drafted)
    texts = [(*record.text, *record.drafted) for record in records]
    trained = training_logits(draft, target, texts, num_depths)
    anchors = torch.tensor([len(record.text) - 2 for record in records])
    trained = trained[:, torch.arange(len(records)), anchors].transpose(0, 1)
    assert_same_q(torch.stack([record.logits for record in records]), trained)


def assert_same_q(decoded: Tensor, trained: Tensor) -> None:
    torch.testing.assert_close(decoded.softmax(-1), trained.softmax(-1), rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(decoded, trained, rtol=TOLERANCE, atol=TOLERANCE * float(trained.abs().max()))


def of_text(records: Sequence[Recorded], completion: Completion) -> list[Recorded]:
    """The records of one completion, one a round; idle slots repeat a round or run past the end."""
    text = (*completion.request.tokens, *completion.tokens)
    found = {r.text: r for r in records if len(r.text) < len(text) and text[: len(r.text)] == r.text}
    return [found[text[: len(completion.request.tokens) + made.position]] for made in completion.rounds]


def assert_text_agrees(draft: Draft, target: TinyTarget, records: Sequence[Recorded], completion: Completion) -> int:
    """The final text fed back once: every depth whose drafted prefix is the text's own; returns how many."""
    text = (*completion.request.tokens, *completion.tokens)
    num_depths = len(records[0].drafted)
    trained = training_logits(draft, target, [text], num_depths)[:, 0]
    decoded, expected = [], []
    for record in of_text(records, completion):
        for depth in range(1, num_depths + 1):
            read = (*record.text, *record.drafted[: depth - 1])
            if text[: len(read)] == read:
                decoded.append(record.logits[depth - 1])
                expected.append(trained[depth - 1, len(record.text) - 2])
    assert_same_q(torch.stack(decoded), torch.stack(expected))
    return len(decoded)


def run(target: TinyTarget, draft: Draft, requests, *, sampling: Sampling, batch_size: int, num_draft_tokens: int = K):
    decoder = ChainDecoder(
        target, draft, sampling=sampling, num_draft_tokens=num_draft_tokens, batch_size=batch_size, seed=1
    )
    return sorted(decoder.run(requests), key=lambda completion: completion.request.prompt_id)


def test_forced_outcomes(case: Case, target: TinyTarget, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy rounds rejected at depth 1, in the middle and nowhere, and one row whose text ends inside a round."""
    requests = make_requests(3, 24)
    greedy = run(target, None, requests, sampling=Sampling(temperature=0.0), batch_size=3)
    texts = [(*c.request.tokens, *c.tokens) for c in greedy]
    vocab = DraftVocab(torch.tensor(sorted({*range(0, target.vocab_size, 2), *(t for x in texts for t in x)})), 264)

    def force(read: tuple[int, ...]) -> int:
        text = next((text for text in texts if text[: len(read)] == read and len(read) < len(text)), None)
        if text is None:
            return 0  # behind a wrong token, or past the end
        prompt = next(len(r.tokens) for r in requests if text[: len(r.tokens)] == r.tokens)
        return text[len(read)] if (len(read) - prompt) % 20 not in WRONG else 2 * (text[len(read)] == 0)

    # The first row ends at a token that is drafted and accepted, with another proposal behind it.
    first = greedy[0].tokens
    eos = next(first[place] for place in (12, 11, 8, 7, 16, 15) if first[place] not in first[:place])
    monkeypatch.setattr(target, "eos_ids", (eos,))
    draft = RecordingDraft(make_draft(case, target.spec, vocab), force)
    completions = run(target, draft, requests, sampling=Sampling(temperature=0.0), batch_size=3)
    accepted = [made.accepted for made in completions[0].rounds]
    assert completions[0].finish_reason == "stop"
    assert completions[0].rounds[-1].past_end
    assert completions[0].writers[-1] > 0
    assert max(len(c.tokens) for c in completions[1:]) > len(completions[0].tokens)
    assert len(accepted) >= 4
    assert {a for c in completions for a in (made.accepted for made in c.rounds)} == {0, 1, 2, 3}
    rounds = [record for completion in completions for record in of_text(draft.records, completion)]
    assert len(rounds) == sum(len(completion.rounds) for completion in completions)
    assert_training_agrees(draft.draft, target, rounds)
    assert_training_agrees(draft.draft, target, draft.records)  # idle rows too: they must stay harmless
    for completion in completions:
        num_agreeing = assert_text_agrees(draft.draft, target, draft.records, completion)
        assert num_agreeing > len(completion.rounds), "depths behind an accepted token are among them"


def test_sampled_rounds(case: Case, target: TinyTarget) -> None:
    """Sampling, text outside the draft vocabulary, slots that are refilled and dropped: five rows in three slots."""
    draft = RecordingDraft(make_draft(case, target.spec, half_vocab(target.vocab_size)))
    completions = run(target, draft, make_requests(5, 10), sampling=Sampling(), batch_size=3)
    rounds = [record for completion in completions for record in of_text(draft.records, completion)]
    assert len(rounds) == sum(len(completion.rounds) for completion in completions) > 20
    assert any(token % 2 == 0 for completion in completions for token in completion.tokens[:-1])
    assert_training_agrees(draft.draft, target, rounds)
    for completion in completions:
        assert assert_text_agrees(draft.draft, target, draft.records, completion) >= len(completion.rounds)


def test_more_depths_than_were_trained(case: Case, target: TinyTarget) -> None:
    """Trained with two depths, drafting seven: later depths are what unrolling further computes."""
    draft = RecordingDraft(make_draft(case, target.spec, num_depths=2))
    options = {"sampling": Sampling(), "batch_size": 2, "num_draft_tokens": 7}
    if case.independent_depths:
        with pytest.raises(ValueError, match="num_draft_tokens=7"):
            run(target, draft, make_requests(3, 8), **options)
        return
    completions = run(target, draft, make_requests(3, 8), **options)
    rounds = [record for completion in completions for record in of_text(draft.records, completion)]
    assert len(rounds) > 6
    assert_training_agrees(draft.draft, target, rounds)


def fresh_states(tokens: Tensor, states: TargetStates, spans: Sequence[tuple[int, int]]) -> FreshStates:
    """Anchors ``start .. stop - 1`` of each row, padded behind them with anything."""
    generator = torch.Generator().manual_seed(3)
    width = max(stop - start for start, stop in spans)
    aux, last = (
        torch.randn(len(spans), width, part.shape[-1], generator=generator) for part in (states.aux, states.last)
    )
    following = torch.full((len(spans), width), 7)
    for row, (start, stop) in enumerate(spans):
        aux[row, : stop - start] = states.aux[row, start:stop]
        last[row, : stop - start] = states.last[row, start:stop]
        following[row, : stop - start] = tokens[row, start + 1 : stop + 1]
    positions = torch.stack([torch.arange(start, start + width) for start, _ in spans])
    lengths = torch.tensor([stop - start for start, stop in spans])
    return FreshStates(following, positions, TargetStates(aux, last), lengths)


def test_observing_in_pieces(case: Case, target: TinyTarget) -> None:
    """The prompt at once, or a few anchors at a time with padding behind them: the same states and drafts."""
    draft = make_draft(case, target.spec)
    tokens = torch.randint(0, 256, (2, 13), generator=torch.Generator().manual_seed(2))
    ones = torch.ones_like(tokens)
    states = target.states(Batch(tokens, torch.arange(13).expand(2, 13), ones, ones, (("a",), ("b",))))

    def drafted_from(cache: PositionCache, spans: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        logits: list[Tensor] = []

        def argmax(depth_logits: Tensor) -> Tensor:
            logits.append(depth_logits)
            return depth_logits.argmax(-1)

        return draft.propose(cache, fresh_states(tokens, states, spans), argmax, K), torch.stack(logits)

    with torch.inference_mode():
        whole, expected = drafted_from(draft.new_cache(2), [(0, 12), (0, 12)])
        cache = draft.new_cache(2)
        draft.observe(cache, fresh_states(tokens, states, [(0, 5), (0, 5)]))
        drafted_from(cache, [(5, 6), (5, 9)])
        pieces, again = drafted_from(cache, [(6, 12), (9, 12)])
    assert torch.equal(whole, pieces)
    assert_same_q(again, expected)
