"""The rows that are decoded together: their caches, and one round of drafting and verification over all of them."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lkspec.decoding.rejection import Verdict, verify_greedy, verify_round
from lkspec.decoding.rows import Row
from lkspec.decoding.sampling import Sampling, invert_cdf
from lkspec.drafts.base import Draft
from lkspec.kv_cache import PositionCache
from lkspec.targets.base import Target
from lkspec.types import FreshStates, Proposal, TargetStates
from lkspec.vocab import DraftVocab


class DecodingBatch:
    """Rows in slots 0, 1, ..: fill every slot before the first round, then fill or drop the slots of finished rows."""

    def __init__(
        self, target: Target, draft: Draft | None, sampling: Sampling, num_draft_tokens: int, num_rows: int
    ) -> None:
        self.rows: list[Row] = []
        self._target, self._draft, self._sampling = target, draft, sampling
        self._num_rows, self._num_depths = num_rows, num_draft_tokens
        self._vocab = draft.vocab if draft is not None else DraftVocab.full(target.vocab_size)
        self._target_cache = target.new_cache(num_rows)
        self._draft_cache = draft.new_cache(num_rows) if draft is not None else PositionCache(num_rows)
        self._fresh: FreshStates | None = None  # [B, K + 1]: what the draft has not seen yet

    def fill(self, slot: int, row: Row) -> None:
        """Prefills one row: the target reads the prompt and samples its first token, the draft observes."""
        target, draft = self._target, self._draft
        prompt = torch.tensor([row.request.tokens], device=target.device)
        positions = torch.arange(prompt.shape[1], device=target.device)[None]
        cache = target.new_cache(1)
        states = target.step(prompt, positions, cache)
        self._target_cache.copy_row(slot, cache, 0, prompt.shape[1])
        token = self._first_token(states, row)
        fresh = FreshStates(
            next_tokens=torch.cat([prompt[:, 1:], token[:, None]], dim=1),
            positions=positions,
            states=states,
            lengths=torch.tensor([prompt.shape[1]], device=target.device),
        )
        if draft is not None:
            draft_cache = draft.new_cache(1)
            draft.observe(draft_cache, fresh)
            self._draft_cache.copy_row(slot, draft_cache, 0, prompt.shape[1])
        self._enter(slot, fresh)
        self.rows[slot : slot + 1] = [row]
        row.begin(int(token))

    def _first_token(self, states: TargetStates, row: Row) -> Int[Tensor, " 1"]:
        logits = self._target.head.logits(states.last[:, -1])
        uniforms = self._uniforms([row], 1)  # greedy too: a row's numbers do not depend on the temperature
        if self._sampling.is_greedy:
            return logits.argmax(-1)
        return invert_cdf(self._sampling.target_probs(logits), uniforms[:, 0])

    def _enter(self, slot: int, read: FreshStates) -> None:
        """The last slot of a prefilled row is the anchor of its first round."""
        if self._fresh is None:
            shape = (self._num_rows, self._num_depths + 1)
            aux, last = (part.new_zeros(*shape, part.shape[-1]) for part in (read.states.aux, read.states.last))
            tokens, positions, lengths = (read.lengths.new_zeros(size) for size in (shape, shape, shape[:1]))
            self._fresh = FreshStates(tokens, positions, TargetStates(aux=aux, last=last), lengths)
        fresh = self._fresh
        fresh.next_tokens[slot, 0] = read.next_tokens[0, -1]
        fresh.positions[slot] = _from(read.positions[:, -1], self._num_depths + 1)[0]
        fresh.states.aux[slot, 0] = read.states.aux[0, -1]
        fresh.states.last[slot, 0] = read.states.last[0, -1]
        fresh.lengths[slot] = 1

    def round(self) -> None:
        """Drafts K tokens a row, verifies them and appends what was accepted and the bonus token."""
        num_depths, fresh = self._num_depths, self._unseen()
        uniforms = self._uniforms(self.rows, 2 * num_depths + 1)
        proposal = self._propose(fresh, uniforms[:, :num_depths])
        ends = fresh.lengths[:, None] - 1
        tokens = torch.cat([fresh.next_tokens.gather(1, ends), proposal.tokens], dim=1)
        positions = _from(fresh.positions.gather(1, ends)[:, 0] + 1, num_depths + 1)
        # Past the context limit there is nothing to verify; such rows end in this round whatever is drafted.
        inside = positions.clamp(max=self._target.max_positions - 1)
        states = self._target.step(tokens, inside, self._target_cache)
        verdict = self._verify(proposal, self._target.head.logits(states.last), uniforms[:, num_depths:])
        self._advance(tokens, positions, states, verdict)

    def _unseen(self) -> FreshStates:
        """Without the slots that no row needs.

        Slots beyond a row's length hold rejected tokens, right behind the real ones: depths drafted next overwrite
        their entries before any query sees them.
        """
        assert self._fresh is not None
        fresh, width = self._fresh, int(self._fresh.lengths.max())
        return FreshStates(
            next_tokens=fresh.next_tokens[:, :width],
            positions=fresh.positions[:, :width],
            states=TargetStates(aux=fresh.states.aux[:, :width], last=fresh.states.last[:, :width]),
            lengths=fresh.lengths,
        )

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

    def _verify(self, proposal: Proposal, logits: Float[Tensor, "B K1 V"], uniforms: Float[Tensor, "B K1"]) -> Verdict:
        if self._sampling.is_greedy:
            return verify_greedy(proposal.tokens, logits.argmax(-1))
        return verify_round(proposal, logits, uniforms, self._vocab, self._sampling)

    def _advance(self, tokens: Tensor, positions: Tensor, states: TargetStates, verdict: Verdict) -> None:
        accepted, bonus = verdict.num_accepted[:, None], verdict.bonus[:, None]
        following = tokens.roll(-1, dims=1).scatter(1, accepted, bonus)
        self._fresh = FreshStates(following, positions, states, lengths=verdict.num_accepted + 1)
        for row, written, count in zip(self.rows, following.tolist(), verdict.num_accepted.tolist(), strict=True):
            row.add_round(written[:count], written[count])

    def _uniforms(self, rows: list[Row], count: int) -> Float[Tensor, "B count"]:
        """As many numbers a row and round whatever is accepted, so that runs can be paired."""
        drawn = [torch.rand(count, generator=row.generator, dtype=torch.float64) for row in rows]
        return torch.stack(drawn).to(self._target.device)

    def drop(self, slot: int) -> None:
        """Removes a row; the last one takes its slot."""
        assert self._fresh is not None
        kept = list(range(len(self.rows)))
        kept[slot] = kept[-1]
        kept.pop()
        self.rows = [self.rows[index] for index in kept]
        self._target_cache.keep(kept)
        self._draft_cache.keep(kept)
        fresh = self._fresh
        self._fresh = replace(
            fresh,
            next_tokens=fresh.next_tokens[kept],
            positions=fresh.positions[kept],
            states=TargetStates(aux=fresh.states.aux[kept], last=fresh.states.last[kept]),
            lengths=fresh.lengths[kept],
        )


def _from(first: Int[Tensor, " B"], count: int) -> Int[Tensor, "B count"]:
    return first[:, None] + torch.arange(count, device=first.device)
