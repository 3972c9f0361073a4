"""The walk: the acceptance length estimated along text that the target itself wrote, without decoding.

A round anchored at t accepts depth k with probability a_k(t) = min(1, q_k(x) / p_k(x)) for the text's own token x
(at T = 0: 1 where argmax q = x), stops at the first rejection, and the next round is anchored ``accepted + 1`` tokens
further. Given the text, that is exactly the law of real decoding. The expectation over the coin flips is taken in
closed form: the probability that a round is anchored at t flows along the text, so the estimate has no sampling noise
of its own. Only rounds whose proposals all lie inside the text count, which does not depend on their outcome.

Many turns are walked at once, each with rounds of k = 1..K drafted tokens. Shape letters beside those of ``types``:
N turns, L anchors of the longest turn, counted from each turn's first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

_GROUP_ANCHORS = 1 << 14  # padded anchors walked at once: bounds memory, and what is read stays in the caches


@dataclass(frozen=True)
class WalkCount:
    """Expected rounds and accepted tokens of one assistant turn, and expected rounds with at least k accepted."""

    rounds: float
    accepted: float
    accepted_at_least: tuple[float, ...]


@dataclass(frozen=True)
class TurnWalks:
    """The walks along N assistant turns with rounds of k = 1..K drafted tokens.

    Attributes:
        rows: the row of each turn.
        begins: the slot of its first token.
        rounds: expected rounds; 0 where the turn is too short for a whole one.
        at_least: ``at_least[n, k-1, a-1]`` of the rounds of k tokens accept at least a; 0 for a > k.
    """

    rows: Int[np.ndarray, " N"]
    begins: Int[np.ndarray, " N"]
    rounds: Float[np.ndarray, "N K"]
    at_least: Float[np.ndarray, "N K K"]

    def count(self, turn: int, depth: int) -> WalkCount:
        """The walk along one turn with rounds of k = ``depth`` tokens."""
        at_least = self.at_least[turn, depth - 1, :depth]
        return WalkCount(float(self.rounds[turn, depth - 1]), float(at_least.sum()), tuple(at_least.tolist()))


def walk_turns(accept: Float[Tensor, "K B T"], turns: Int[Tensor, "B T"]) -> TurnWalks:
    """Walks every assistant turn that has an anchor: one that begins its row has none before its first token.

    Args:
        accept: a_k at each anchor; entries whose proposal lies outside the anchor's turn are not read.
        turns: turn number of each token, 0 outside.
    """
    rows, begins, lengths = _find_turns(turns.cpu().numpy())
    probabilities = accept.cpu().double().numpy().T  # [T, B, K]
    num_turns, (num_slots, _, num_depths) = len(rows), probabilities.shape
    rounds, at_least = np.zeros((num_turns, num_depths)), np.zeros((num_turns, num_depths, num_depths))
    num_groups = 1 + num_turns * int(lengths.max(initial=0)) // _GROUP_ANCHORS
    for group in np.array_split(np.argsort(lengths, kind="stable"), num_groups):
        slots = begins[group] - 1 + np.arange(lengths[group].max(initial=1) - 1)[:, None]
        along = probabilities[slots.clip(max=num_slots - 1), rows[group]]
        rounds[group], at_least[group] = _walk(along, lengths[group])
    return TurnWalks(rows, begins, rounds, at_least)


def _find_turns(
    turns: Int[np.ndarray, "B T"],
) -> tuple[Int[np.ndarray, " N"], Int[np.ndarray, " N"], Int[np.ndarray, " N"]]:
    """(row, slot of the first token, number of tokens) of each turn with a token before it, row by row."""
    framed = np.pad(turns, ((0, 0), (1, 1)))
    inner = framed[:, 1:-1]
    rows, begins = np.nonzero((inner > 0) & (inner != framed[:, :-2]))
    _, lasts = np.nonzero((inner > 0) & (inner != framed[:, 2:]))  # in the same order
    anchored = begins > 0
    return rows[anchored], begins[anchored], (lasts - begins + 1)[anchored]


def _walk(
    accept: Float[np.ndarray, "L N K"], lengths: Int[np.ndarray, " N"]
) -> tuple[Float[np.ndarray, "N K"], Float[np.ndarray, "N K K"]]:
    """Rounds and ``at_least`` of turns of some lengths: visit(t + a + 1) += visit(t) P(accepted = a at t), a = 0..k."""
    num_anchors, num_turns, num_depths = accept.shape
    depths = np.arange(1, num_depths + 1)
    # A round of k at anchor t proposes the turn's tokens t + 1 .. t + k; it has no outcome where one lies outside.
    whole = np.arange(num_anchors)[:, None, None] + depths < lengths[:, None]  # [L, N, k]
    known = whole[:, None] & (depths[:, None, None] <= depths)  # [L, a, N, k]
    survive = np.moveaxis(np.cumprod(accept, axis=-1), -1, 1)  # P(accepted >= a), [L, a, N]
    survive = np.where(known, survive[..., None], 0.0)
    ends = -np.diff(survive, axis=1, prepend=whole[:, None], append=0.0)  # P(accepted = a), a = 0..K
    visit = np.zeros((num_anchors + num_depths + 1, num_turns, num_depths))
    visit[0] = 1.0
    for anchor in range(num_anchors):
        visit[anchor + 1 : anchor + num_depths + 2] += visit[anchor] * ends[anchor]
    visit = visit[:num_anchors] * whole
    return visit.sum(0), np.einsum("tnk,tank->nka", visit, survive)
