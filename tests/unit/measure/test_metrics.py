"""Acceptance metrics against formulas by hand, an enumeration of every resample, and coverage on synthetic rounds."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lkspec.measure.metrics import PromptRounds, acceptance_metrics, group_counts, paired_difference_interval
from lkspec.types import Round


def prompt(name: str, accepted: list[int], *, group: str | None = None, past_end: int = 0) -> PromptRounds:
    """A continuation whose last ``past_end`` rounds lie partly past the end of the text."""
    inside = len(accepted) - past_end
    rounds = tuple(Round(position=i, accepted=a, past_end=i >= inside) for i, a in enumerate(accepted))
    return PromptRounds(name, group or name, rounds, num_tokens=sum(accepted) + len(accepted) + 1)


def every_resample(counts: list[tuple[int, ...]]) -> np.ndarray:
    """Column sums of all G^G equally likely resamples, enumerated."""
    return np.array([np.sum(drawn, axis=0) for drawn in itertools.product(counts, repeat=len(counts))], dtype=float)


def probability_below(values: np.ndarray, bound: float) -> tuple[float, float]:
    """P(value < bound) and P(value <= bound); a quantile of the enumeration lies between them."""
    return float(np.mean(values < bound - 1e-12)), float(np.mean(values <= bound + 1e-12))


def test_by_hand():
    prompts = [prompt("a", [0, 2, 3]), prompt("b", [1], group="a"), prompt("c", [3, 3])]
    metrics = acceptance_metrics(prompts, num_draft_tokens=3)
    assert (metrics.num_accepted, metrics.num_rounds) == (12, 6)
    assert metrics.tau == 3.0
    assert metrics.acceptance_per_position == (5 / 6, 4 / 6, 3 / 6)
    assert (metrics.num_prompts, metrics.num_tokens) == (3, 9 + 3 + 9)
    assert group_counts(prompts) == {"a": (6, 4), "c": (6, 2)}


def test_turns_of_one_prompt_are_one_prompt():
    turns = [prompt("q1", [1, 1]), prompt("q1", [2]), prompt("q2", [0])]
    assert acceptance_metrics(turns, num_draft_tokens=2).num_prompts == 2


def test_rounds_past_the_end_can_be_left_out():
    prompts = [prompt("a", [1, 2, 0], past_end=1), prompt("b", [2, 0, 0], past_end=2)]
    metrics = acceptance_metrics(prompts, num_draft_tokens=2, exclude_past_end=True)
    assert (metrics.num_accepted, metrics.num_rounds) == (5, 3)
    assert metrics.tau == 1 + 5 / 3
    assert metrics.acceptance_per_position == (1.0, 2 / 3)
    assert metrics.num_tokens == sum(p.num_tokens for p in prompts)
    bare = acceptance_metrics([prompt("a", [1, 2]), prompt("b", [2])], num_draft_tokens=2)
    assert (metrics.low, metrics.high) == (bare.low, bare.high)
    assert group_counts(prompts, exclude_past_end=True) == {"a": (3, 2), "b": (2, 1)}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("prompts", [[], [prompt("a", [])], [prompt("a", []), prompt("b", [])]])
def test_without_rounds_everything_is_nan(prompts):
    metrics = acceptance_metrics(prompts, num_draft_tokens=2)
    assert (metrics.num_rounds, metrics.num_accepted) == (0, 0)
    assert all(math.isnan(x) for x in (metrics.tau, metrics.low, metrics.high, *metrics.acceptance_per_position))
    assert len(metrics.acceptance_per_position) == 2


@pytest.mark.filterwarnings("error")
def test_one_group_has_no_interval_and_a_group_without_rounds_is_none():
    metrics = acceptance_metrics([prompt("a", [1, 2]), prompt("b", [])], num_draft_tokens=2)
    assert metrics.tau == 2.5
    assert math.isnan(metrics.low)
    assert math.isnan(metrics.high)


def test_baseline_without_drafts():
    metrics = acceptance_metrics([prompt("a", [])], num_draft_tokens=0)
    assert metrics.acceptance_per_position == ()


@given(st.lists(st.lists(st.integers(0, 4), max_size=6), min_size=2, max_size=8))
@settings(max_examples=60, deadline=None)
def test_positions_add_up_and_interval_stays_within_the_groups(accepted):
    prompts = [prompt(str(i), rounds) for i, rounds in enumerate(accepted)]
    metrics = acceptance_metrics(prompts, num_draft_tokens=4, num_resamples=50)
    per_group = [1 + sum(rounds) / len(rounds) for rounds in accepted if rounds]
    if len(per_group) < 2:
        assert math.isnan(metrics.low)
    else:
        assert metrics.tau == pytest.approx(1 + sum(metrics.acceptance_per_position))
        assert min(per_group) - 1e-9 <= metrics.low <= metrics.high <= max(per_group) + 1e-9


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_interval_is_the_one_of_all_resamples(confidence):
    rounds = [[0, 0, 1], [3, 2], [1, 1, 0, 2], [3, 3, 3, 1, 2], [0]]
    prompts = [prompt(str(i), accepted) for i, accepted in enumerate(rounds)]
    metrics = acceptance_metrics(prompts, num_draft_tokens=3, confidence=confidence, num_resamples=40_000)
    sums = every_resample([(sum(accepted), len(accepted)) for accepted in rounds])
    taus = 1 + sums[:, 0] / sums[:, 1]
    for bound, level in [(metrics.low, (1 - confidence) / 2), (metrics.high, (1 + confidence) / 2)]:
        below, at_most = probability_below(taus, bound)
        assert below - 0.01 <= level <= at_most + 0.01  # 40,000 resamples: 0.0025 is one standard error at worst


def test_groups_are_resampled_whole():
    # Both turns of every question add up to the same counts, so that no resample of questions can differ.
    prompts = [prompt(f"q{q}", [a], group=f"q{q}") for q in range(6) for a in (0, 4)]
    metrics = acceptance_metrics(prompts, num_draft_tokens=4)
    assert metrics.low == metrics.tau == metrics.high == 3.0
    apart = [prompt(f"{i}", [a]) for i, a in enumerate([0, 4] * 6)]
    assert acceptance_metrics(apart, num_draft_tokens=4).high > 3.5


def test_same_seed_same_interval():
    prompts = [prompt(str(i), [i % 4] * (1 + i % 7)) for i in range(40)]
    first, again, other = (acceptance_metrics(prompts, num_draft_tokens=3, seed=seed) for seed in (3, 3, 4))
    assert first == again
    assert (first.low, first.high) != (other.low, other.high)


def test_coverage_on_correlated_rounds():
    """Prompts differ in length and in how well they are predicted; the interval must still hold tau 95 times in 100."""
    rng = np.random.default_rng(11)
    rates, lengths = np.array([0.3, 0.6, 0.9]), np.array([8, 14, 5])
    truth = 1 + (rates * lengths).sum() / lengths.sum()
    num_covered = 0
    for _ in range(300):
        kinds = rng.integers(3, size=60)
        prompts = [prompt(str(i), rng.binomial(1, rates[k], lengths[k]).tolist()) for i, k in enumerate(kinds)]
        metrics = acceptance_metrics(prompts, num_draft_tokens=1, num_resamples=400)
        num_covered += metrics.low <= truth <= metrics.high
    assert 0.91 <= num_covered / 300 <= 0.98  # one standard error is 0.013


def test_paired_interval_is_the_one_of_all_resamples():
    first = {"a": (3.0, 4.0), "b": (9.0, 5.0), "c": (0.5, 2.5), "d": (4.0, 3.0), "e": (2.0, 6.0)}
    second = {"a": (2.0, 4.0), "b": (9.5, 5.0), "c": (1.0, 2.0), "d": (3.0, 3.0), "e": (2.5, 6.0), "z": (9.0, 1.0)}
    difference, low, high = paired_difference_interval(first, second, confidence=0.9, num_resamples=40_000)
    assert difference == pytest.approx(18.5 / 20.5 - 18 / 20)
    sums = every_resample([(*first[group], *second[group]) for group in first])
    differences = sums[:, 0] / sums[:, 1] - sums[:, 2] / sums[:, 3]
    for bound, level in [(low, 0.05), (high, 0.95)]:
        below, at_most = probability_below(differences, bound)
        assert below - 0.01 <= level <= at_most + 0.01


def test_pairing_removes_the_spread_between_groups():
    rng = np.random.default_rng(5)
    first = {str(i): (float(rng.integers(1, 90)), 30.0) for i in range(40)}
    second = {group: (accepted + 3.0, rounds) for group, (accepted, rounds) in first.items()}
    difference, low, high = paired_difference_interval(first, second)
    assert (difference, low, high) == pytest.approx((-0.1, -0.1, -0.1))


@pytest.mark.filterwarnings("error")
def test_paired_without_rounds_is_nan():
    assert all(map(math.isnan, paired_difference_interval({"a": (0, 0)}, {"a": (0, 0)})))
    difference, low, high = paired_difference_interval({"a": (1, 1)}, {"a": (1, 2)})
    assert difference == 0.5
    assert math.isnan(low)
    assert math.isnan(high)


@pytest.mark.filterwarnings("error")
def test_paired_leaves_out_resamples_without_a_denominator():
    difference, low, high = paired_difference_interval({"a": (1, 1), "b": (2, 1)}, {"a": (1, 1), "b": (0, 0)})
    assert difference == pytest.approx(0.5)
    assert (low, high) == (0.0, 0.5)  # {a, a} and {a, b}; {b, b} has no second ratio


def test_paired_refuses_groups_that_never_meet():
    with pytest.raises(ValueError, match=r"share; the first has q1, the second q1/0: name the groups alike"):
        paired_difference_interval({"q1": (1, 1)}, {"q1/0": (1, 1)})
