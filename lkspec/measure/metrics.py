"""The acceptance length and its interval: sums first, one division last.

A round is one verification of K drafted tokens. The acceptance length is ``tau = 1 + accepted / rounds``, pooled over a
whole benchmark. Rounds of one text are not independent and neither are the two turns of one MT-bench question, so the
interval resamples whole groups of rounds (a percentile bootstrap over questions), never single rounds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from lkspec.types import Round


@dataclass(frozen=True)
class PromptRounds:
    """The rounds of one continuation.

    Attributes:
        prompt_id: name of the prompt; turns of one conversation share it.
        group: what the bootstrap resamples (MT-bench: the question, both turns).
        rounds: every verification of the continuation.
        num_tokens: tokens generated.
    """

    prompt_id: str
    group: str
    rounds: tuple[Round, ...]
    num_tokens: int


@dataclass(frozen=True)
class AcceptanceMetrics:
    """What decoding a benchmark has shown; nan where there is nothing to divide by.

    Attributes:
        tau: 1 + num_accepted / num_rounds.
        low, high: the bootstrap interval of tau; nan with fewer than two groups, which show no spread.
        acceptance_per_position: [K], the share of the rounds with at least k accepted tokens (the engines' per-position
            counters); they add up to tau - 1.
        num_rounds, num_accepted: the sums behind tau.
        num_prompts: distinct prompts, whether or not they had a round.
        num_tokens: tokens generated, whether or not a round counted.
    """

    tau: float
    low: float
    high: float
    acceptance_per_position: tuple[float, ...]
    num_rounds: int
    num_accepted: int
    num_prompts: int
    num_tokens: int


def acceptance_metrics(
    prompts: Sequence[PromptRounds],
    *,
    num_draft_tokens: int,
    exclude_past_end: bool = False,
    confidence: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
) -> AcceptanceMetrics:
    """Pools rounds into ``tau = 1 + accepted / rounds`` with a percentile bootstrap interval over groups.

    Args:
        prompts: the rounds, continuation by continuation.
        num_draft_tokens: K of every round.
        exclude_past_end: leaves out rounds with a proposal past the end of the text, as the walk does.
        confidence: mass inside the interval.
        num_resamples: bootstrap resamples.
        seed: of the resampling.
    """
    accepted = np.array([round.accepted for round in _counted(prompts, exclude_past_end)], dtype=np.int64)
    histogram = np.bincount(accepted, minlength=num_draft_tokens + 1)
    assert len(histogram) == num_draft_tokens + 1, "a round accepted more tokens than were drafted"
    num_rounds, num_accepted = len(accepted), int(accepted.sum())
    at_least = histogram[::-1].cumsum()[::-1][1:]
    groups = group_counts(prompts, exclude_past_end=exclude_past_end)
    # A group without rounds says nothing about a ratio; dropping it keeps every resample's denominator positive.
    counts = np.array([count for count in groups.values() if count[1] > 0], dtype=np.float64).reshape(-1, 2)
    sums = _resampled_sums(counts, num_resamples, seed)
    low, high = _percentiles(_tau(sums), confidence) if len(counts) > 1 else (float("nan"), float("nan"))
    return AcceptanceMetrics(
        tau=1 + num_accepted / num_rounds if num_rounds else float("nan"),
        low=low,
        high=high,
        acceptance_per_position=tuple(float(n / num_rounds) if num_rounds else float("nan") for n in at_least),
        num_rounds=num_rounds,
        num_accepted=num_accepted,
        num_prompts=len({prompt.prompt_id for prompt in prompts}),
        num_tokens=sum(prompt.num_tokens for prompt in prompts),
    )


def group_counts(prompts: Sequence[PromptRounds], *, exclude_past_end: bool = False) -> dict[str, tuple[int, int]]:
    """(accepted, rounds) of each group, groups without a round included."""
    counts = {prompt.group: (0, 0) for prompt in prompts}
    for prompt in prompts:
        rounds = _counted([prompt], exclude_past_end)
        accepted, num_rounds = counts[prompt.group]
        counts[prompt.group] = (accepted + sum(round.accepted for round in rounds), num_rounds + len(rounds))
    return counts


def paired_difference_interval(
    first: Mapping[str, tuple[float, float]],
    second: Mapping[str, tuple[float, float]],
    *,
    confidence: float = 0.99,
    num_resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """``(tau_first - tau_second, low, high)`` over common groups, both resampled with the same groups.

    Pairing removes the spread between groups that both share: the interval is the one of the difference, much narrower
    than what two separate intervals suggest.

    Args:
        first, second: (accepted, rounds) of each group; expected counts of a walk may be fractions.
        confidence: mass inside the interval.
        num_resamples: bootstrap resamples; those in which one side has no round are left out.
        seed: of the resampling.

    Returns:
        The difference and its interval; nan without rounds, the interval nan with fewer than two groups.

    Raises:
        ValueError: no group is common to both.
    """
    common = [group for group in first if group in second]
    if not common:
        raise ValueError(
            f"a paired difference needs groups that both sides share; the first has {_preview(first)}, "
            f"the second {_preview(second)}: name the groups alike"
        )
    counts = np.array([[*first[group], *second[group]] for group in common], dtype=np.float64)
    counts = counts[(counts[:, 1] > 0) | (counts[:, 3] > 0)]
    total = counts.sum(axis=0, keepdims=True)
    difference = float((_tau(total[:, :2]) - _tau(total[:, 2:]))[0])
    sums = _resampled_sums(counts, num_resamples, seed)
    differences = _tau(sums[:, :2]) - _tau(sums[:, 2:])
    differences = differences[np.isfinite(differences)]
    if len(counts) < 2 or not len(differences):
        return difference, float("nan"), float("nan")
    return difference, *_percentiles(differences, confidence)


def _counted(prompts: Sequence[PromptRounds], exclude_past_end: bool) -> list[Round]:
    return [round for prompt in prompts for round in prompt.rounds if not (exclude_past_end and round.past_end)]


def _resampled_sums(counts: Float[np.ndarray, "G C"], num_resamples: int, seed: int) -> Float[np.ndarray, "R C"]:
    """Column sums of resamples of G groups with replacement: how often each group was drawn, times its counts."""
    num_groups = len(counts)
    if num_groups == 0:
        return np.zeros((num_resamples, counts.shape[1]))
    drawn = np.random.default_rng(seed).integers(num_groups, size=(num_resamples, num_groups))
    drawn += np.arange(num_resamples)[:, None] * num_groups  # one range of bins a resample: a single bincount
    times = np.bincount(drawn.ravel(), minlength=num_resamples * num_groups).reshape(num_resamples, num_groups)
    return times @ counts


def _tau(sums: Float[np.ndarray, "R 2"]) -> Float[np.ndarray, " R"]:
    accepted, rounds = sums.T
    return 1 + np.divide(accepted, rounds, out=np.full(len(sums), np.nan), where=rounds > 0)


def _percentiles(values: Float[np.ndarray, " R"], confidence: float) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _preview(groups: Mapping[str, object]) -> str:
    return ", ".join([*list(groups)[:3], *(["..."] if len(groups) > 3 else [])]) or "none"
