"""Intervals: against an analysis of variance written out, against tables of t, and by simulation of coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lkspec.reporting.intervals import Counts, estimate, paired_gain, student_quantile


@pytest.mark.parametrize(
    ("freedom", "expected"), [(1, 12.7062047), (2, 4.3026527), (5, 2.5705818), (30, 2.0422725), (1e6, 1.9599664)]
)
def test_quantiles_of_t(freedom, expected):
    assert student_quantile(0.975, freedom) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("probability", [0.6, 0.9, 0.995])
def test_quantiles_where_they_have_a_closed_form(probability):
    assert student_quantile(probability, 1) == pytest.approx(math.tan(math.pi * (probability - 0.5)), rel=1e-5)
    a = 2 * probability - 1
    assert student_quantile(probability, 2) == pytest.approx(a * math.sqrt(2 / (1 - a * a)), rel=1e-5)


def two_way(values: np.ndarray) -> tuple[float, float]:
    """Variance and degrees of freedom of the grand mean of [S, P] numbers, by sums of squares."""
    S, P = values.shape
    grand = sum(values[s, p] for s in range(S) for p in range(P)) / (S * P)
    rows = [sum(values[s]) / P for s in range(S)]
    columns = [sum(values[:, p]) / S for p in range(P)]
    ms_rows = P * sum((row - grand) ** 2 for row in rows) / (S - 1)
    ms_columns = S * sum((column - grand) ** 2 for column in columns) / (P - 1)
    rest = sum((values[s, p] - rows[s] - columns[p] + grand) ** 2 for s in range(S) for p in range(P))
    ms_rest = rest / ((S - 1) * (P - 1))
    variance = max(ms_rows + ms_columns - ms_rest, ms_columns, ms_rest) / (S * P)
    freedom = (variance * S * P) ** 2 / (
        ms_rows**2 / (S - 1) + ms_columns**2 / (P - 1) + ms_rest**2 / ((S - 1) * (P - 1))
    )
    return variance, min(max(freedom, S - 1), P - 1)


@pytest.mark.parametrize("seed", range(4))
def test_means_have_the_interval_of_a_two_way_layout(seed):
    generator = np.random.default_rng(seed)
    values = generator.standard_normal((3, 9)) + generator.standard_normal((3, 1)) + generator.standard_normal(9)
    found = estimate([Counts(values, np.ones_like(values))], offset=5.0)
    variance, freedom = two_way(values)
    assert found.value == pytest.approx(5 + values.mean())
    assert found.half_width == pytest.approx(student_quantile(0.975, freedom) * math.sqrt(variance), rel=1e-9)
    assert (found.num_seeds, found.num_groups) == (3, 9)


def test_one_seed_has_the_interval_of_a_ratio_over_prompts():
    numerator, denominator = np.array([[3.0, 1.0, 8.0, 5.0]]), np.array([[10.0, 4.0, 20.0, 9.0]])
    ratio = 17 / 43
    residuals = [n - ratio * d for n, d in zip(numerator[0], denominator[0], strict=True)]
    error = math.sqrt(sum(r * r for r in residuals) / 3 * 4) / 43
    found = estimate([Counts(numerator, denominator)])
    assert found.value == pytest.approx(ratio)
    assert found.half_width == pytest.approx(3.1824463 * error, rel=1e-5)


def test_strata_are_averaged_and_their_spread_adds_up():
    generator = np.random.default_rng(0)
    one, other = generator.standard_normal((1, 30)), 1 + generator.standard_normal((1, 40))
    found = estimate([Counts(one, np.ones((1, 30))), Counts(other, np.ones((1, 40)))])
    assert found.value == pytest.approx((one.mean() + other.mean()) / 2)
    variance = (one.var(ddof=1) / 30 + other.var(ddof=1) / 40) / 4
    assert found.half_width == pytest.approx(2.0 * math.sqrt(variance), rel=0.01)  # t with 55 to 68 degrees


def test_pairing_removes_what_both_share():
    generator = np.random.default_rng(1)
    prompts = generator.standard_normal((2, 50))
    first = Counts(prompts + 0.1 + 0.01 * generator.standard_normal((2, 50)), np.ones((2, 50)))
    second = Counts(prompts, np.ones((2, 50)))
    gain = paired_gain([first], [second])
    assert gain.excludes_zero
    assert gain.half_width < 0.1 * estimate([first]).half_width


def test_equal_runs_show_a_gain_of_exactly_nothing():
    counts = Counts(np.ones((2, 5)), np.full((2, 5), 2.0))
    gain = paired_gain([counts], [counts])
    assert (gain.value, gain.half_width, gain.excludes_zero) == (0.0, 0.0, False)


def test_wholes_have_an_interval_over_seeds_alone():
    values = np.array([[1.0], [2.0], [4.0]])
    found = estimate([Counts(values, np.ones((3, 1)), grouped=False)])
    assert found.half_width == pytest.approx(4.3026527 * values.std(ddof=1) / math.sqrt(3), rel=1e-5)
    assert found.num_groups == 0
    assert math.isnan(estimate([Counts(values[:1], np.ones((1, 1)), grouped=False)]).half_width)


def test_one_prompt_shows_no_spread():
    assert math.isnan(estimate([Counts(np.ones((1, 1)), np.ones((1, 1)))]).half_width)
    assert not estimate([Counts(np.ones((1, 1)), np.ones((1, 1)))]).excludes_zero


def simulated(generator: np.random.Generator, effect: float, spread: tuple[float, float]) -> tuple[Counts, Counts]:
    """Accepted tokens and rounds of a base and of what adds ``effect`` to its rate: 3 seeds, 40 prompts.

    Prompts differ in rate and length, and in how much they gain; seeds differ in how much training gained.
    """
    seeds, prompts = 3, 40
    base = generator.uniform(0.3, 0.9, (1, prompts))
    gains = effect + spread[0] * generator.standard_normal((seeds, 1)) + spread[1] * generator.standard_normal(prompts)
    rounds = generator.integers(20, 60, (seeds, prompts)).astype(float)
    noise = 0.5 / np.sqrt(rounds)
    sides = [(rate + noise * generator.standard_normal((seeds, prompts))) * rounds for rate in (base + gains, base)]
    return Counts(sides[0], rounds), Counts(sides[1], rounds)


@pytest.mark.parametrize("spread", [(0.0, 0.0), (0.01, 0.05), (0.03, 0.03)], ids=["noise", "prompts", "seeds"])
def test_an_interval_covers_the_truth_and_no_effect_is_rarely_called_one(spread):
    generator = np.random.default_rng(7)
    trials, effect = 300, 0.05
    covered = called = 0
    for _ in range(trials):
        gain = paired_gain(*([side] for side in simulated(generator, effect, spread)))
        covered += gain.low <= effect <= gain.high
        called += paired_gain(*([side] for side in simulated(generator, 0.0, spread))).excludes_zero
    # 95 % -+ 3 standard errors of 1.26 %; where only noise spreads, the interval is on the safe side.
    assert 0.912 <= covered / trials <= 1.0
    assert called / trials <= 0.088
    if spread != (0.0, 0.0):
        assert covered / trials <= 0.987
