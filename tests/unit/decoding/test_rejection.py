"""One round, enumerated: its law must be the target's own, whatever the draft proposes.

``verify_round`` is treated as a black box. Its coins are measured by bisection on each uniform number, so the law of
(accepted, bonus) given a draft is exact to rounding; drafts are enumerated with the probability that q gives them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lkspec.decoding.rejection import Verification, verify_greedy, verify_round
from lkspec.decoding.sampling import Sampling
from lkspec.types import Proposal
from lkspec.vocab import DraftVocab

BISECTIONS = 45
NUM_GRID = 13
BELOW_ONE = float(np.nextafter(1.0, 0.0))


def verify(proposal: Proposal, target_probs: Tensor, uniforms: Tensor, vocab: DraftVocab) -> Verification:
    """``verify_round`` of a target with these distributions: a softmax of their logarithms."""
    return verify_round(proposal, target_probs.log(), uniforms, vocab, Sampling(temperature=1.0))


# --- the law of verify_round, measured ---------------------------------------------------------------------------


def measured_law(proposal: Proposal, target_probs: Tensor, vocab: DraftVocab) -> np.ndarray:
    """P(num_accepted = n, bonus = v) of each row, [B, K + 1, V], from the outcomes of ``verify_round`` alone."""
    num_rows, num_depths = proposal.tokens.shape
    accept = np.ones((num_rows, num_depths))
    for depth in range(num_depths):
        accept[:, depth] = measured_acceptance(proposal, target_probs, vocab, depth)
    law = np.zeros((num_rows, num_depths + 1, target_probs.shape[-1]))
    for count in range(num_depths + 1):
        stopped = 1.0 - accept[:, count] if count < num_depths else np.ones(num_rows)
        weight = accept[:, :count].prod(1) * stopped
        possible = weight > 0
        if possible.any():
            rows = torch.from_numpy(np.flatnonzero(possible))
            some = Proposal(proposal.tokens[rows], proposal.probs[rows])
            law[possible, count] = weight[possible, None] * measured_bonus(some, target_probs[rows], vocab, count)
    return law


def measured_acceptance(proposal: Proposal, target_probs: Tensor, vocab: DraftVocab, depth: int) -> np.ndarray:
    """Measure of the u_depth in [0, 1) that accept the drafted token (0 where an earlier one never is), [B]."""
    num_rows, num_depths = proposal.tokens.shape
    uniforms = torch.full((num_rows, num_depths + 1), BELOW_ONE, dtype=torch.float64)
    uniforms[:, :depth] = 0.0

    def accepted(uniform: Tensor) -> Tensor:
        uniforms[:, depth] = uniform
        return verify(proposal, target_probs, uniforms, vocab).num_accepted > depth

    return measure_below(accepted, num_rows).numpy()


def measured_bonus(proposal: Proposal, target_probs: Tensor, vocab: DraftVocab, count: int) -> np.ndarray:
    """P(bonus = v | num_accepted = count) of rows where that is possible, [B, V]."""
    num_rows, num_depths = proposal.tokens.shape
    uniforms = torch.zeros(num_rows, num_depths + 1, dtype=torch.float64)
    uniforms[:, count:] = BELOW_ONE

    def at_most(token: int) -> Callable[[Tensor], Tensor]:
        def holds(uniform: Tensor) -> Tensor:
            uniforms[:, -1] = uniform
            verdict = verify(proposal, target_probs, uniforms, vocab)
            assert (verdict.num_accepted == count).all()
            return verdict.bonus <= token

        return holds

    cumulative = [measure_below(at_most(token), num_rows) for token in range(target_probs.shape[-1])]
    return np.diff(torch.stack(cumulative, dim=1).numpy(), axis=1, prepend=0.0)


def measure_below(holds: Callable[[Tensor], Tensor], num_rows: int) -> Tensor:
    """Measure of the u in [0, 1) at which a condition holds; it must hold exactly below one threshold."""
    low, high = torch.zeros(num_rows, dtype=torch.float64), torch.ones(num_rows, dtype=torch.float64)
    never, always = ~holds(low), holds(torch.full_like(low, BELOW_ONE))
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        inside = holds(middle)
        low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
    measure = torch.where(always, 1.0, torch.where(never, 0.0, low))
    for u in np.linspace(0.01, 0.99, NUM_GRID):
        assert torch.equal(holds(torch.full_like(low, u)), u < measure)
    return measure


# --- a pair of chains whose distributions depend on the whole prefix ---------------------------------------------


@dataclass
class ChainPair:
    """p and q after every prefix, from seeded logits."""

    num_depths: int
    vocab: DraftVocab
    sampling: Sampling
    seed: int
    draft_is_target: bool = False
    ruled_out: bool = False

    def p(self, prefix: tuple[int, ...]) -> Tensor:
        return self.sampling.target_probs(self._logits(prefix, 0, self.vocab.target_size))

    def q(self, prefix: tuple[int, ...]) -> Tensor:
        if self.draft_is_target:
            return self.vocab.restrict(self.p(prefix))
        logits = self._logits(prefix, 1, self.vocab.size)
        if self.ruled_out:  # a draft that gives one token no mass at all
            logits[len(prefix) % self.vocab.size] = -torch.inf
        return self.sampling.draft_probs(logits)

    def _logits(self, prefix: tuple[int, ...], who: int, size: int) -> Tensor:
        digits = "".join(map(str, prefix))
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + int(f"1{digits}{who}"))
        return 1.5 * torch.randn(size, generator=generator, dtype=torch.float64)

    def sequence_law(self) -> np.ndarray:
        """The target's own law of K + 1 tokens, [V] * (K + 1)."""
        size, length = self.vocab.target_size, self.num_depths + 1
        law = np.zeros((size,) * length)
        for tokens in itertools.product(range(size), repeat=length):
            law[tokens] = np.prod([float(self.p(tokens[:i])[token]) for i, token in enumerate(tokens)])
        return law

    def round_law(self) -> np.ndarray:
        """The law of K + 1 tokens when one round writes the first ones and the target continues."""
        size, length = self.vocab.target_size, self.num_depths + 1
        ids = self.vocab.ids.tolist()
        drafts = list(itertools.product(range(len(ids)), repeat=self.num_depths))
        q_rows = [
            torch.stack([self.q(tuple(ids[d] for d in draft[:i])) for i in range(len(draft))]) for draft in drafts
        ]
        weights = [
            np.prod([float(q[i, d]) for i, d in enumerate(draft)]) for draft, q in zip(drafts, q_rows, strict=True)
        ]
        tokens = torch.tensor([[ids[d] for d in draft] for draft in drafts])
        p_rows = torch.stack([torch.stack([self.p(tuple(row[:i])) for i in range(length)]) for row in tokens.tolist()])
        outcome = measured_law(Proposal(tokens, torch.stack(q_rows)), p_rows, self.vocab)
        law = np.zeros((size,) * length)
        for index, row in enumerate(tokens.tolist()):
            for count, bonus in itertools.product(range(length), range(size)):
                written = (*row[:count], bonus)
                mass = weights[index] * outcome[index, count, bonus]
                if mass > 0:
                    law[written] += mass * self._continuation(written, length)
        return law

    def _continuation(self, written: tuple[int, ...], length: int) -> np.ndarray | float:
        """The target's law of the tokens after ``written``, [V] * (length - len(written))."""
        if len(written) == length:
            return 1.0
        p = self.p(written).numpy()
        return np.stack([p[v] * self._continuation((*written, v), length) for v in range(len(p))])


FULL4 = DraftVocab.full(4)
FULL5 = DraftVocab.full(5)
SOME5 = DraftVocab(torch.tensor([0, 2, 3]), 5)
ONE4 = DraftVocab(torch.tensor([1]), 4)
PAIRS = {
    "K1": ChainPair(1, FULL5, Sampling(), 0),
    "K2": ChainPair(2, FULL5, Sampling(), 1),
    "K3": ChainPair(3, FULL4, Sampling(), 2),
    "K1-truncated": ChainPair(1, SOME5, Sampling(), 3),
    "K2-truncated": ChainPair(2, SOME5, Sampling(), 4),
    "K3-truncated": ChainPair(3, SOME5, Sampling(), 5),
    "K3-one-token-draft": ChainPair(3, ONE4, Sampling(), 6),
    "temperature": ChainPair(2, FULL4, Sampling(temperature=0.6), 7),
    "top-k": ChainPair(2, FULL5, Sampling(top_k=2), 8),
    "top-k-same": ChainPair(2, FULL5, Sampling(top_k=2, draft_filter="same"), 9),
    "top-p": ChainPair(2, FULL5, Sampling(top_p=0.7), 10),
    "top-p-same": ChainPair(3, FULL4, Sampling(top_p=0.7, draft_filter="same"), 11),
    "both-truncated": ChainPair(3, SOME5, Sampling(temperature=1.3, top_k=4, top_p=0.8), 12),
    "both-truncated-same": ChainPair(2, SOME5, Sampling(top_k=2, top_p=0.8, draft_filter="same"), 13),
    "sharpened": ChainPair(3, FULL4, Sampling(temperature=0.8, sharpness=2.5), 18),
    "flattened-truncated": ChainPair(2, SOME5, Sampling(sharpness=0.5), 19),
    "q-with-zeros": ChainPair(3, FULL4, Sampling(), 14, ruled_out=True),
    "p-equals-q": ChainPair(2, FULL5, Sampling(), 15, draft_is_target=True),
    "p-equals-q-filtered": ChainPair(3, FULL4, Sampling(top_k=2), 16, draft_is_target=True),
    "greedy": ChainPair(3, FULL4, Sampling(temperature=0.0), 17),
    "greedy-truncated": ChainPair(2, SOME5, Sampling(temperature=0.0), 18),
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_round_preserves_the_targets_law(name: str) -> None:
    pair = PAIRS[name]
    np.testing.assert_allclose(pair.round_law(), pair.sequence_law(), rtol=0, atol=1e-12)


def test_acceptance_is_the_overlap_of_p_and_q() -> None:
    """P(depth 1 accepted) = sum_v min(p_v, q_v), the alpha that training maximises."""
    pair = PAIRS["K1-truncated"]
    p, q = pair.p(()), pair.q(())
    tokens = pair.vocab.ids[:, None]
    law = measured_law(Proposal(tokens, q.expand(3, 1, 3)), p.expand(3, 2, 5), pair.vocab)
    accepted = float((q.numpy() * law[:, 1].sum(1)).sum())
    assert accepted == pytest.approx(float(torch.minimum(p[pair.vocab.ids], q).sum()), abs=1e-12)


# --- single cases -------------------------------------------------------------------------------------------------


def one_hot(*ids: int, size: int) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor([ids]), size).double()


@pytest.mark.parametrize("uniform", [0.0, 0.5, BELOW_ONE])
@pytest.mark.parametrize(
    ("drafted", "accepted", "bonus"), [([1, 2], 2, 3), ([1, 0], 1, 2), ([0, 2], 0, 1), ([0, 0], 0, 1)]
)
def test_one_hot_rows_verify_greedily(drafted: list[int], accepted: int, bonus: int, uniform: float) -> None:
    """The target's argmaxes are 1, 2, 3: the prefix that agrees is accepted, the bonus is the target's own."""
    proposal = Proposal(torch.tensor([drafted]), one_hot(*drafted, size=4))
    by_law = verify(proposal, one_hot(1, 2, 3, size=4), torch.full((1, 3), uniform, dtype=torch.float64), FULL4)
    greedy = verify_greedy(torch.tensor([drafted]), torch.tensor([[1, 2, 3]]))
    for verdict in (by_law, greedy):
        assert verdict.num_accepted.tolist() == [accepted]
        assert verdict.bonus.tolist() == [bonus]


def test_greedy_verification_without_drafts() -> None:
    verdict = verify_greedy(torch.zeros(2, 0, dtype=torch.int64), torch.tensor([[3], [1]]))
    assert verdict.num_accepted.tolist() == [0, 0]
    assert verdict.bonus.tolist() == [3, 1]


def test_without_drafts_the_bonus_is_a_sample_of_p() -> None:
    p = torch.tensor([0.25, 0.0, 0.5, 0.25], dtype=torch.float64)
    uniforms = torch.tensor([[0.0], [0.2], [0.25], [0.7], [0.75], [BELOW_ONE]], dtype=torch.float64)
    empty = Proposal(torch.zeros(6, 0, dtype=torch.int64), torch.zeros(6, 0, 4, dtype=torch.float64))
    verdict = verify(empty, p.expand(6, 1, 4), uniforms, FULL4)
    assert verdict.num_accepted.tolist() == [0] * 6
    assert verdict.bonus.tolist() == [0, 0, 2, 2, 3, 3]


def test_a_rejection_without_residual_falls_back_to_p() -> None:
    """q a little above p everywhere, as rounding can make it: u near 1 rejects although no residual mass is left."""
    p = torch.tensor([[[0.0, 0.5, 0.5], [1.0, 0.0, 0.0]]], dtype=torch.float64)
    q = torch.tensor([[[0.0, 0.5 + 1e-15, 0.5 + 1e-15]]], dtype=torch.float64)
    for uniform, expected in [(0.1, 1), (0.9, 2)]:
        uniforms = torch.tensor([[BELOW_ONE, uniform]], dtype=torch.float64)
        verdict = verify(Proposal(torch.tensor([[1]]), q), p, uniforms, DraftVocab.full(3))
        assert verdict.num_accepted.tolist() == [0]
        assert verdict.bonus.tolist() == [expected]


def test_rows_are_independent() -> None:
    """A batch of rows gives each row the verdict it gets alone."""
    generator = torch.Generator().manual_seed(0)
    q = torch.rand(32, 3, 3, generator=generator, dtype=torch.float64)
    p = torch.rand(32, 4, 5, generator=generator, dtype=torch.float64)
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    tokens = SOME5.to_target(torch.randint(0, 3, (32, 3), generator=generator))
    uniforms = torch.rand(32, 4, generator=generator, dtype=torch.float64)
    whole = verify(Proposal(tokens, q), p, uniforms, SOME5)
    assert len(set(whole.num_accepted.tolist())) == 4, "the case should reach every number of accepted tokens"
    for row in range(32):
        one = slice(row, row + 1)
        alone = verify(Proposal(tokens[one], q[one]), p[one], uniforms[one], SOME5)
        assert (alone.num_accepted, alone.bonus) == (whole.num_accepted[row], whole.bonus[row])


# --- properties ---------------------------------------------------------------------------------------------------


def distributions(size: int) -> st.SearchStrategy[list[float]]:
    """Distributions with many zeros and many equal entries."""
    weights = st.lists(st.sampled_from([0.0, 0.0, 1.0, 1.0, 3.0, 1e-9, 1e9]), min_size=size, max_size=size)
    return weights.filter(any).map(lambda w: [x / sum(w) for x in w])


@st.composite
def rounds(draw) -> tuple[Proposal, Tensor, Tensor, DraftVocab]:
    target_size = draw(st.integers(2, 6))
    ids = sorted(draw(st.sets(st.integers(0, target_size - 1), min_size=1)))
    num_depths = draw(st.integers(0, 4))
    q = [draw(distributions(len(ids))) for _ in range(num_depths)]
    p = [draw(distributions(target_size)) for _ in range(num_depths + 1)]
    tokens = [ids[draw(st.sampled_from([i for i, x in enumerate(row) if x > 0]))] for row in q]
    unit = st.one_of(st.floats(0, 1, exclude_max=True), st.sampled_from([0.0, BELOW_ONE]))
    uniforms = [draw(unit) for _ in range(num_depths + 1)]
    probs = torch.tensor(q, dtype=torch.float64).reshape(1, num_depths, len(ids))
    proposal = Proposal(torch.tensor([tokens], dtype=torch.int64).reshape(1, num_depths), probs)
    target_probs = torch.tensor([p], dtype=torch.float64)
    return (
        proposal,
        target_probs,
        torch.tensor([uniforms], dtype=torch.float64),
        DraftVocab(torch.tensor(ids), target_size),
    )


@given(rounds())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_nothing_impossible_under_p_is_ever_written(case: tuple[Proposal, Tensor, Tensor, DraftVocab]) -> None:
    proposal, target_probs, uniforms, vocab = case
    verdict = verify(proposal, target_probs, uniforms, vocab)
    num_depths = proposal.tokens.shape[1]
    count, bonus = int(verdict.num_accepted), int(verdict.bonus)
    assert 0 <= count <= num_depths
    assert 0 <= bonus < vocab.target_size
    for depth in range(count):
        assert target_probs[0, depth, proposal.tokens[0, depth]] > 0
    assert target_probs[0, count, bonus] > 0
    if count < num_depths:
        p, q = target_probs[0, count], vocab.expand(proposal.probs[0, count])
        residual = (p - q).clamp_min(0)
        assert residual.sum() == 0 or residual[bonus] > 0
