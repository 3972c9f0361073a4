"""A target and drafts whose distributions are known exactly, and decoding written out for one row.

The toy target's next token depends on its whole prefix through c = sum_{j >= 1} j x_j mod M (x_0 does not count), which
it computes from the tokens in its cache. So a stale, missing or misplaced cache entry changes the text.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lkspec.decoding.chain import BONUS, PREFILL, ChainDecoder, Completion, Request
from lkspec.decoding.sampling import Sampling, row_generator
from lkspec.drafts.base import Draft
from lkspec.nn.kv_cache import PositionCache
from lkspec.types import DraftSampler, FreshStates, LinearHead, Round, TargetStates
from lkspec.vocab import DraftVocab

V, M = 5, 11
SOME = DraftVocab(torch.tensor([0, 1, 3]), V)
GREEDY, SAMPLED = Sampling(temperature=0.0), Sampling(temperature=1.0)


def random_table(num_contexts: int, size: int, *, seed: int, scale: float = 1.5) -> Tensor:
    """Probabilities [M, V]."""
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(num_contexts, size, generator=generator, dtype=torch.float64)).softmax(-1)


def logs(table: Tensor) -> Tensor:
    """Logarithms that an identity head can multiply: 0 log-probability is finite, and still exactly 0 in a softmax."""
    return table.log().clamp_min(-1e4)


class ToyTarget:
    """log p(x_{t+1} | x_1..x_t) = logs(table)[c], read off by an identity head."""

    device = torch.device("cpu")

    def __init__(self, table: Tensor, *, eos_ids: tuple[int, ...] = (), max_positions: int = 10_000) -> None:
        self.table, self.eos_ids, self.max_positions = table, eos_ids, max_positions
        self.vocab_size = table.shape[1]
        self.head = LinearHead(weight=torch.eye(self.vocab_size, dtype=torch.float64))
        self.steps: list[tuple[int, int]] = []  # rows and tokens a row of every forward pass

    def new_cache(self, num_rows: int) -> PositionCache:
        return PositionCache(num_rows)

    def step(self, tokens: Tensor, positions: Tensor, cache: PositionCache) -> TargetStates:
        assert int(positions.max()) < self.max_positions, "a real model would read past its context"
        self.steps.append((tokens.shape[0], tokens.shape[1]))
        contexts = _remember(cache, positions, positions * tokens, len(self.table))
        return TargetStates(aux=contexts[..., None].double(), last=logs(self.table)[contexts])

    def context(self, text: Sequence[int]) -> int:
        return sum(i * token for i, token in enumerate(text)) % len(self.table)


class ToyDraft(Draft):
    """log q(x_{t+1+k} | x_1..x_{t+k}) = logs(table)[c]: equal tables make a perfect draft.

    c comes from the draft's own cache, where slot t holds x_{t+1} and depth k writes slot t + k - 1. At every anchor
    it must be what follows from the target's state and the token after it, whose alignment is thereby checked.
    """

    def __init__(self, table: Tensor, vocab: DraftVocab, *, checked_below: int = 10_000) -> None:
        super().__init__(vocab, 1)
        self.table = table
        self.checked_below = checked_below  # positions at the context limit are clamped: idle rows there hold nonsense

    def observe(self, cache: PositionCache, fresh: FreshStates) -> Tensor:
        following = (fresh.positions + 1) * fresh.next_tokens
        contexts = _remember(cache, fresh.positions, following, len(self.table))
        derived = (fresh.states.aux[..., 0].long() + following) % len(self.table)
        for row, length in enumerate(fresh.lengths.tolist()):
            if int(fresh.positions[row, length - 1]) < self.checked_below:
                assert torch.equal(contexts[row, :length], derived[row, :length])
        return contexts[..., None].double()

    def propose(self, cache: PositionCache, fresh: FreshStates, sample: DraftSampler, num_draft_tokens: int) -> Tensor:
        rows = torch.arange(len(fresh.lengths))
        contexts = self.observe(cache, fresh)[rows, fresh.lengths - 1].long()
        anchors = fresh.positions[rows, fresh.lengths - 1][:, None]
        tokens: list[Tensor] = []
        for depth in range(1, num_draft_tokens + 1):
            if depth > 1:
                positions = anchors + depth - 1
                contexts = _remember(cache, positions, (positions + 1) * tokens[-1][:, None], len(self.table))
            tokens.append(self.vocab.to_target(sample(logs(self.table)[contexts[:, 0]])))
        return torch.stack(tokens, dim=1)


class ScriptedDraft(Draft):
    """Proposes the texts it is given, each token made wrong where ``is_right(position, depth)`` says so.

    It finds its text by what its cache holds of x_1, x_2, ...; with it any pattern of acceptance can be made from a
    real target.
    """

    def __init__(self, texts: Sequence[Sequence[int]], vocab_size: int, is_right) -> None:
        super().__init__(DraftVocab.full(vocab_size), 1)
        self.texts = [tuple(text) for text in texts]
        self.is_right = is_right

    def observe(self, cache: PositionCache, fresh: FreshStates) -> Tensor:
        cache.at(fresh.positions)
        stored = fresh.next_tokens.double()[:, None, :, None]
        return cache.update(stored, stored, 0)[0][:, 0, :, 0]

    def propose(self, cache: PositionCache, fresh: FreshStates, sample: DraftSampler, num_draft_tokens: int) -> Tensor:
        rows = torch.arange(len(fresh.lengths))
        anchors = fresh.positions[rows, fresh.lengths - 1].tolist()
        histories = self.observe(cache, fresh).long().tolist()
        tokens: list[Tensor] = []
        for depth in range(1, num_draft_tokens + 1):
            logits = torch.full((len(rows), self.vocab.size), -100.0)
            for row, anchor in enumerate(anchors):
                logits[row, self._next(histories[row][: anchor + 1], anchor + 1 + depth, depth)] = 0.0
            tokens.append(sample(logits))
        return torch.stack(tokens, dim=1)

    def _next(self, history: list[int], position: int, depth: int) -> int:
        known = [text for text in self.texts if list(text[1 : len(history) + 1]) == history]
        token = known[0][position] if known and position < len(known[0]) else 0
        return token if self.is_right(position, depth) else (token + 1) % self.vocab.size


def _remember(cache: PositionCache, positions: Tensor, terms: Tensor, modulus: int) -> Tensor:
    """Stores a term at each position and returns, [B, S], the sum of all that each position sees, mod M."""
    cache.at(positions)
    stored = terms.double()[:, None, :, None]
    visible, _ = cache.update(stored, stored, 0)
    return (cache.mask()[:, 0] * visible[:, 0, None, :, 0].long()).sum(-1) % modulus


def decode_one(
    target: ToyTarget, draft: ToyDraft | None, request: Request, sampling: Sampling, num_depths: int, seed: int
) -> tuple[list[int], list[int], str, list[Round]]:
    """One row, decoded by the book from tables and the row's own random numbers: tokens, writers, reason, rounds."""
    generator = row_generator(seed, request.prompt_id, request.turn)
    limit = min(request.max_new_tokens, target.max_positions - len(request.tokens))
    text, writers = list(request.tokens), []
    rounds: list[tuple[int, int]] = []
    finish_reason = None

    def p_after(prefix: Sequence[int]) -> list[float]:
        return sampling.target_probs(logs(target.table)[target.context(prefix)]).tolist()

    def write(token: int, writer: int) -> None:
        nonlocal finish_reason
        if finish_reason is None:
            text.append(token)
            writers.append(writer)
            if token in target.eos_ids:
                finish_reason = "stop"
            elif len(writers) == limit:
                finish_reason = "length"

    write(_inverted(p_after(text), _uniforms(generator, 1)[0]), PREFILL)
    while finish_reason is None:
        u = _uniforms(generator, 2 * num_depths + 1)
        start, prefix, drafted, rejection = len(writers), tuple(text), [], None
        q_rows = []
        for depth in range(num_depths):
            q_draft = sampling.draft_probs(logs(draft.table)[target.context((*prefix, *drafted))])
            q_rows.append(draft.vocab.expand(q_draft).tolist())
            drafted.append(_inverted(q_rows[-1], u[depth]))
        accepted = 0
        while accepted < num_depths and rejection is None:
            p, q, token = p_after((*prefix, *drafted[:accepted])), q_rows[accepted], drafted[accepted]
            if u[num_depths + accepted] < p[token] / q[token]:
                accepted += 1
            else:
                rejection = [max(a - b, 0.0) for a, b in zip(p, q, strict=True)]
        bonus = _inverted(rejection or p_after((*prefix, *drafted)), u[2 * num_depths])
        for depth in range(accepted):
            write(drafted[depth], depth + 1)
        write(bonus, BONUS)
        rounds.append((start, accepted))
    made = [Round(s, a, past_end=s + num_depths > len(writers)) for s, a in rounds] if num_depths else []
    return text[len(request.tokens) :], writers, finish_reason, made


def _uniforms(generator: torch.Generator, num: int) -> list[float]:
    return torch.rand(num, generator=generator, dtype=torch.float64).tolist()


def _inverted(weights: Sequence[float], uniform: float) -> int:
    threshold, passed = uniform * sum(weights), 0.0
    for token, weight in enumerate(weights):
        passed += weight
        if passed > threshold:
            return token
    raise AssertionError("a uniform number below one passes every threshold")


def toy_target(**options) -> ToyTarget:
    return ToyTarget(random_table(M, V, seed=0), **options)


def similar_draft(vocab: DraftVocab, **options) -> ToyDraft:
    """Close enough to the toy target that every number of accepted tokens occurs."""
    mixed = 0.5 * vocab.restrict(random_table(M, V, seed=0)) + 0.5 * random_table(M, vocab.size, seed=1)
    return ToyDraft(mixed / mixed.sum(-1, keepdim=True), vocab, **options)


def make_requests(num: int, *, seed: int = 0, longest: int = 6, most_new: int = 14) -> list[Request]:
    """Prompts of different lengths with limits from 1 on."""
    rng = np.random.default_rng(seed)
    return [
        Request(
            prompt_id=f"p{i}",
            turn=i % 2,
            tokens=tuple(rng.integers(0, V, rng.integers(1, longest + 1)).tolist()),
            max_new_tokens=int(rng.integers(1, most_new + 1)),
        )
        for i in range(num)
    ]


def decode(target, draft, requests, *, num_draft_tokens=3, batch_size=4, sampling=SAMPLED, seed=0) -> list[Completion]:
    """Completions in the order of the requests."""
    decoder = ChainDecoder(
        target, draft, sampling=sampling, num_draft_tokens=num_draft_tokens, batch_size=batch_size, seed=seed
    )
    done = {(c.request.prompt_id, c.request.turn): c for c in decoder.run(requests)}
    assert len(done) == len(requests)
    return [done[r.prompt_id, r.turn] for r in requests]


def greedy_text(target: ToyTarget, prompt: tuple[int, ...], num: int) -> tuple[int, ...]:
    """Prompt and greedy continuation, as if there were no end-of-text token."""
    text = list(prompt)
    for _ in range(num):
        text.append(int(target.table[target.context(text)].argmax()))
    return tuple(text)
