"""The walk: the acceptance length estimated along text that the target itself wrote, without decoding.

A round anchored at t accepts depth k with probability a_k(t) = min(1, q_k(x) / p_k(x)) for the text's own token x
(at T = 0: 1 where argmax q = x), stops at the first rejection, and the next round is anchored ``accepted + 1`` tokens
further. Given the text, that is exactly the law of real decoding. The expectation over the coin flips is taken in
closed form: the probability that a round is anchored at t flows along the text, so the estimate has no sampling noise
of its own. Only rounds whose K proposals lie inside the text count, which does not depend on their outcome.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True)
class WalkCount:
    """Expected rounds and accepted tokens of one assistant turn, and expected rounds with at least k accepted."""

    rounds: float
    accepted: float
    accepted_at_least: tuple[float, ...]

    @property
    def acceptance_length(self) -> float:
        """tau = 1 + accepted / rounds."""
        return 1.0 + self.accepted / self.rounds if self.rounds > 0 else float("nan")


def walk_turn(accept: Float[np.ndarray, "K T"], inside: Bool[np.ndarray, " T"], first: int) -> WalkCount:
    """Walks one turn from anchor ``first``.

    Args:
        accept: a_k at each anchor.
        inside: anchors whose K proposals lie inside the turn (the mask at depth K); from ``first`` on they are a run.
        first: the turn's first anchor: its x_{t+1} is the turn's first generated token.
    """
    num_depths, num_slots = accept.shape
    visit = np.zeros(num_slots + num_depths + 1)
    visit[first] = 1.0
    at_least = np.zeros(num_depths)
    rounds = 0.0
    anchor = first
    while anchor < num_slots and inside[anchor]:
        survive = np.cumprod(accept[:, anchor])  # P(accepted >= k), k = 1..K
        here = visit[anchor]
        rounds += here
        at_least += here * survive
        # P(accepted = a) for a = 0..K moves the anchor a + 1 further.
        visit[anchor + 1 : anchor + num_depths + 2] += here * -np.diff(survive, prepend=1.0, append=0.0)
        anchor += 1
    return WalkCount(rounds=rounds, accepted=float(at_least.sum()), accepted_at_least=tuple(at_least.tolist()))


def walk_turns(accept: Float[Tensor, "K T"], mask: Bool[Tensor, "K T"], turns: torch.Tensor) -> list[WalkCount]:
    """Walks every assistant turn of a row; turns too short for one whole round are left out.

    Args:
        accept: a_k at each anchor of the row, K being the number of drafted tokens of the walk.
        mask: contract 1 at depths 1..K.
        turns: turn number of each token, 0 outside.
    """
    probabilities = accept.double().cpu().numpy()
    inside = mask[-1].cpu().numpy()
    numbers = turns.cpu().numpy()
    counts = []
    for number in sorted(set(numbers[numbers > 0].tolist())):
        first = int(np.flatnonzero(numbers == number)[0]) - 1
        if first >= 0 and inside[first]:
            counts.append(walk_turn(probabilities, inside, first))
    return counts
