"""The rows that are decoded together: their caches, and one round of drafting and verification over all of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lkspec.decoding.rejection import Verification, verify_greedy, verify_round
from lkspec.decoding.rows import Continuation
from lkspec.decoding.sampling import Sampling, invert_cdf
from lkspec.drafts.base import Draft
from lkspec.nn.kv_cache import PositionCache
from lkspec.targets.base import Target
from lkspec.types import FreshStates, Proposal, TargetStates, stack_rows
from lkspec.vocab import DraftVocab


class _GroupLimits(NamedTuple):
    """Which prompts are read in one forward pass.

    Attributes:
        padding: of each prompt; reading more of it costs longer than a forward pass of the prompt's own.
        tokens: of a group, padding included; longer prompts are read alone.
    """

    padding: int
    tokens: int


_ON_CPU = _GroupLimits(padding=16, tokens=256)  # padding costs arithmetic, and 100 tokens keep the cores busy
_ON_GPU = _GroupLimits(padding=512, tokens=16_384)  # a forward pass of few tokens takes as long as one of hundreds


class DecodingBatch:
    """Rows in slots 0, 1, ..: fill every slot before the first round, then fill or drop the slots of finished rows."""

    def __init__(
        self, target: Target, draft: Draft | None, sampling: Sampling, num_draft_tokens: int, num_rows: int
    ) -> None:
        self.rows: list[Continuation] = []
        self._target, self._draft, self._sampling = target, draft, sampling
        self._num_rows, self._num_depths = num_rows, num_draft_tokens
        self._vocab = draft.vocab if draft is not None else DraftVocab.full(target.vocab_size)
        self._target_cache = target.new_cache(num_rows)
        self._draft_cache = draft.new_cache(num_rows) if draft is not None else PositionCache(num_rows)
        self._fresh: FreshStates | None = None  # [B, K + 1]: what the draft has not seen yet

    @property
    def finished(self) -> list[int]:
        """Slots of rows whose text has ended, in ascending order."""
        return [slot for slot, row in enumerate(self.rows) if row.finish_reason is not None]

    def fill(self, slots: list[int], rows: list[Continuation]) -> None:
        """Puts new rows into slots, in ascending order, and prefills them in groups of similar length."""
        for slot, row in zip(slots, rows, strict=True):
            self.rows[slot : slot + 1] = [row]
        for group in _groups(slots, rows, _ON_CPU if self._target.device.type == "cpu" else _ON_GPU):
            self._prefill(group)

    def _prefill(self, slots: list[int]) -> None:
        """The target reads the rows' prompts and samples their first tokens, the draft observes.

        Prompts are padded at their ends. What the caches hold there is out of sight: a slot behind a row's end is
        written again before any query of the row comes that far.
        """
        target, rows = self._target, [self.rows[slot] for slot in slots]
        prompts = stack_rows(torch.tensor(row.request.tokens) for row in rows).to(target.device)
        lengths, into = torch.tensor([[len(row.request.tokens) for row in rows], slots], device=target.device)
        positions = torch.arange(prompts.shape[1], device=target.device).expand_as(prompts)
        cache = target.new_cache(len(rows))
        states = target.step(prompts, positions, cache)
        self._target_cache.copy_rows(into, cache, prompts.shape[1])
        ends = lengths - 1
        first = self._first_tokens(states.last[torch.arange(len(rows), device=target.device), ends], rows)
        fresh = FreshStates(
            next_tokens=prompts.roll(-1, dims=1).scatter(1, ends[:, None], first[:, None]),
            positions=positions,
            states=states,
            lengths=lengths,
        )
        if self._draft is not None:
            draft_cache = self._draft.new_cache(len(rows))
            self._draft.observe(draft_cache, fresh)
            self._draft_cache.copy_rows(into, draft_cache, prompts.shape[1])
        self._enter(into, fresh)
        for row, token in zip(rows, first.tolist(), strict=True):
            row.begin(token)

    def _first_tokens(self, last: Float[Tensor, "R H"], rows: list[Continuation]) -> Int[Tensor, " R"]:
        logits = self._target.head.logits(last)
        uniforms = self._uniforms(rows, 1)  # greedy too: a row's numbers do not depend on the temperature
        if self._sampling.is_greedy:
            return logits.argmax(-1)
        return invert_cdf(self._sampling.target_probs(logits), uniforms[:, 0])

    def _enter(self, slots: Int[Tensor, " R"], read: FreshStates) -> None:
        """The last real slot of a prefilled row is the anchor of its first round."""
        if self._fresh is None:
            shape = (self._num_rows, self._num_depths + 1)
            aux, last = (part.new_zeros(*shape, part.shape[-1]) for part in (read.states.aux, read.states.last))
            tokens, positions, lengths = (read.lengths.new_zeros(size) for size in (shape, shape, shape[:1]))
            self._fresh = FreshStates(tokens, positions, TargetStates(aux=aux, last=last), lengths)
        fresh = self._fresh
        fresh.next_tokens[slots, 0] = read.at_anchor(read.next_tokens)
        fresh.positions[slots] = _from(read.at_anchor(read.positions), self._num_depths + 1)
        fresh.states.aux[slots, 0] = read.at_anchor(read.states.aux)
        fresh.states.last[slots, 0] = read.at_anchor(read.states.last)
        fresh.lengths[slots] = 1

    def round(self) -> None:
        """Drafts K tokens a row, verifies them and appends what was accepted and the bonus token."""
        assert self._fresh is not None
        # Without the slots that no row needs. Those beyond a row's length hold rejected tokens, right behind the real
        # ones: depths drafted next overwrite their entries before any query sees them.
        num_depths, fresh = self._num_depths, self._fresh.at(slice(None), slice(int(self._fresh.lengths.max())))
        uniforms = self._uniforms(self.rows, 2 * num_depths + 1)
        proposal = self._propose(fresh, uniforms[:, :num_depths])
        tokens = torch.cat([fresh.at_anchor(fresh.next_tokens)[:, None], proposal.tokens], dim=1)
        positions = _from(fresh.at_anchor(fresh.positions) + 1, num_depths + 1)
        # Past the context limit there is nothing to verify; such rows end in this round whatever is drafted.
        inside = positions.clamp(max=self._target.max_positions - 1)
        states = self._target.step(tokens, inside, self._target_cache)
        logits = self._target.head.logits(states.last)
        if self._sampling.is_greedy:
            verified = verify_greedy(proposal.tokens, logits.argmax(-1))
        else:
            verified = verify_round(proposal, logits, uniforms[:, num_depths:], self._vocab, self._sampling)
        self._advance(tokens, positions, states, verified)

    def _propose(self, fresh: FreshStates, uniforms: Float[Tensor, "B K"]) -> Proposal:
        """K tokens a row and, unless drafting is greedy, the q that they were sampled from."""
        probs: list[Tensor] = []

        def sample(logits: Float[Tensor, "B D"]) -> Int[Tensor, " B"]:
            if self._sampling.is_greedy:
                return logits.argmax(-1)
            probs.append(self._sampling.draft_probs(logits))
            return invert_cdf(probs[-1], uniforms[:, len(probs) - 1])

        tokens = torch.zeros_like(uniforms, dtype=torch.int64)
        if self._draft is not None:
            tokens = self._draft.propose(self._draft_cache, fresh, sample, self._num_depths)
        nothing = uniforms.new_zeros(len(uniforms), 0, self._vocab.size)
        return Proposal(tokens=tokens, probs=torch.stack(probs, dim=1) if probs else nothing)

    def _advance(self, tokens: Tensor, positions: Tensor, states: TargetStates, verified: Verification) -> None:
        accepted, bonus = verified.num_accepted[:, None], verified.bonus[:, None]
        following = tokens.roll(-1, dims=1).scatter(1, accepted, bonus)
        self._fresh = FreshStates(following, positions, states, lengths=verified.num_accepted + 1)
        for row, written, count in zip(self.rows, following.tolist(), verified.num_accepted.tolist(), strict=True):
            row.add_round(written[:count], written[count])

    def _uniforms(self, rows: list[Continuation], count: int) -> Float[Tensor, "B count"]:
        """As many numbers a row and round whatever is accepted, so that runs can be paired."""
        drawn = [torch.rand(count, generator=row.generator, dtype=torch.float64) for row in rows]
        return torch.stack(drawn).to(self._target.device)

    def drop(self, slots: list[int]) -> None:
        """Removes rows; the last of those that stay take their slots."""
        if not slots:
            return
        assert self._fresh is not None
        num_kept, dropped = len(self.rows) - len(slots), set(slots)
        moved = (slot for slot in range(num_kept, len(self.rows)) if slot not in dropped)
        kept = [next(moved) if slot in dropped else slot for slot in range(num_kept)]
        self.rows = [self.rows[slot] for slot in kept]
        self._target_cache.keep(kept)
        self._draft_cache.keep(kept)
        self._fresh = self._fresh.at(torch.tensor(kept, dtype=torch.int64, device=self._target.device))


def _groups(slots: list[int], rows: list[Continuation], limits: _GroupLimits) -> list[list[int]]:
    """The slots, longest prompt first, in groups that are each padded to the first one's length."""
    lengths = {slot: len(row.request.tokens) for slot, row in zip(slots, rows, strict=True)}
    groups: list[list[int]] = []
    longest = 0
    for slot in sorted(slots, key=lengths.__getitem__, reverse=True):
        fits = bool(groups) and (len(groups[-1]) + 1) * longest <= limits.tokens
        if fits and longest - lengths[slot] <= limits.padding:
            groups[-1].append(slot)
        else:
            groups.append([slot])
            longest = lengths[slot]
    return groups


def _from(first: Int[Tensor, " B"], count: int) -> Int[Tensor, "B count"]:
    return first[:, None] + torch.arange(count, device=first.device)
