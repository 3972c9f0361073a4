"""Contract 2: decoding computes the q that training computes, round by round and depth by depth.

Every round of a batched decoding is recorded: what the draft's cache says the text is, what was drafted, and the draft
logits of each depth. The same prefix and drafted tokens are then fed to ``unroll`` as if they were training text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from lkspec.decoding.chain import ChainDecoder, Completion, Request
from lkspec.decoding.sampling import Sampling
from lkspec.drafts.base import Draft
from lkspec.drafts.eagle3 import Eagle3
from lkspec.kv_cache import PositionCache
from lkspec.targets.tiny import TinyTarget
from lkspec.types import Batch, DraftSampler, FreshStates, stack_rows
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


class RecordingDraft(Draft):
    """Wraps a draft; keeps the tokens it observes in one more layer of its cache, so that rows move with their text.

    ``force`` chooses the drafted token (target id) from the text and what is drafted so far; None leaves the sample.
    """

    def __init__(self, draft: Draft, force: Callable[[tuple[int, ...]], int] | None = None) -> None:
        super().__init__()
        self.draft, self.force, self.vocab, self.max_depths = draft, force, draft.vocab, draft.max_depths
        self.records: list[Recorded] = []

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
        cache.at(fresh.positions)
        tokens = fresh.next_tokens.double()[:, None, :, None]
        seen = cache.update(tokens, tokens, 1)[0][:, 0, :, 0].long()
        anchors = fresh.positions.gather(1, fresh.lengths[:, None] - 1)[:, 0].tolist()
        return [(FIRST, *seen[row, : anchor + 1].tolist()) for row, anchor in enumerate(anchors)]


def make_draft(target: TinyTarget, vocab: DraftVocab, *, num_depths: int = K, **options) -> Eagle3:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        draft = Eagle3(target.spec, vocab, num_depths=num_depths, **options)
        with torch.no_grad():  # at its initial values the layer hardly changes anything
            for parameter in draft.parameters():
                if parameter is not draft.lm_head.weight:
                    parameter.add_(0.05 * torch.randn_like(parameter))
    return draft


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


@pytest.fixture(params=["tiny_target", "tiny_gemma3", "tiny_gpt_oss"])
def target(request) -> TinyTarget:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("norm_before_residual", [False, True])
def test_forced_outcomes(target: TinyTarget, norm_before_residual: bool, monkeypatch: pytest.MonkeyPatch) -> None:
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
    draft = RecordingDraft(make_draft(target, vocab, norm_before_residual=norm_before_residual), force)
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


@pytest.mark.parametrize("truncated", [False, True], ids=["full", "truncated"])
def test_sampled_rounds(target: TinyTarget, truncated: bool) -> None:
    """Sampling, slots that are refilled and dropped: five rows in three slots."""
    ids = torch.arange(1, target.vocab_size, 2) if truncated else torch.arange(target.vocab_size)
    draft = RecordingDraft(make_draft(target, DraftVocab(ids, target.vocab_size)))
    completions = run(target, draft, make_requests(5, 10), sampling=Sampling(), batch_size=3)
    rounds = [record for completion in completions for record in of_text(draft.records, completion)]
    assert len(rounds) == sum(len(completion.rounds) for completion in completions) > 20
    assert_training_agrees(draft.draft, target, rounds)
    for completion in completions:
        assert assert_text_agrees(draft.draft, target, draft.records, completion) >= len(completion.rounds)


def test_more_depths_than_were_trained(tiny_target: TinyTarget) -> None:
    """Trained with two depths, drafting seven: later depths are what unrolling further computes."""
    draft = RecordingDraft(make_draft(tiny_target, DraftVocab.full(tiny_target.vocab_size), num_depths=2))
    completions = run(tiny_target, draft, make_requests(3, 8), sampling=Sampling(), batch_size=2, num_draft_tokens=7)
    rounds = [record for completion in completions for record in of_text(draft.records, completion)]
    assert_training_agrees(draft.draft, tiny_target, rounds)


def test_observing_in_pieces(tiny_target: TinyTarget) -> None:
    """The prompt at once, or a few anchors at a time with padding behind them: the same states and drafts."""
    draft = make_draft(tiny_target, DraftVocab.full(tiny_target.vocab_size))
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, 256, (2, 13), generator=generator)
    ones = torch.ones_like(tokens)
    states = tiny_target.states(Batch(tokens, torch.arange(13).expand(2, 13), ones, ones, (("a",), ("b",))))

    def fresh(start: int, stops: tuple[int, int]) -> FreshStates:
        width = max(stops) - start
        aux = torch.randn(2, width, states.aux.shape[-1], generator=generator)  # padding may hold anything
        following = torch.full((2, width), 7)
        for row, stop in enumerate(stops):
            aux[row, : stop - start] = states.aux[row, start:stop]
            following[row, : stop - start] = tokens[row, start + 1 : stop + 1]
        return FreshStates(
            next_tokens=following,
            positions=torch.arange(start, start + width).expand(2, width),
            states=type(states)(aux=aux, last=aux[..., :64]),
            lengths=torch.tensor(stops) - start,
        )

    def argmax(logits: Tensor) -> Tensor:
        drafted.append(logits)
        return logits.argmax(-1)

    with torch.inference_mode():
        drafted: list[Tensor] = []
        whole = draft.propose(draft.new_cache(2), fresh(0, (12, 12)), argmax, K)
        expected, drafted = drafted, []
        cache = draft.new_cache(2)
        draft.observe(cache, fresh(0, (5, 5)))
        draft.propose(cache, fresh(5, (6, 9)), lambda logits: logits.argmax(-1), K)
        # Row 0 observes 6..11, row 1 only 9..11, behind each other's padding.
        late = fresh(6, (12, 12))
        positions = torch.stack([torch.arange(6, 12), torch.arange(9, 15)])
        aux, following = late.states.aux.clone(), late.next_tokens.clone()
        aux[1, :3], following[1, :3] = states.aux[1, 9:12], tokens[1, 10:13]
        pieces = FreshStates(following, positions, type(states)(aux, aux[..., :64]), torch.tensor([6, 3]))
        again = draft.propose(cache, pieces, argmax, K)
    assert torch.equal(whole, again)
    assert_same_q(torch.stack(drafted), torch.stack(expected))
