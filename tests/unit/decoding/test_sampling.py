"""Distributions against a plain loop over tokens, and sampling by inversion, cell by cell."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lkspec.decoding.sampling import Sampling, distribution, invert_cdf, row_generator

BELOW_ONE = float(np.nextafter(1.0, 0.0))
GOLDEN = [0.42895650937431706, 0.2848098732940263]


def naive_distribution(logits: list[float], temperature: float, top_k: int, top_p: float) -> list[float]:
    """One row, token by token; among equal logits the lower id comes first."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    if temperature == 0:
        return [float(i == order[0]) for i in range(len(logits))]
    kept = order[:top_k] if top_k > 0 else order
    weights = {i: math.exp((logits[i] - max(logits)) / temperature) for i in kept}
    total = math.fsum(weights.values())
    nucleus: dict[int, float] = {}
    for i in kept:
        if math.fsum(nucleus.values()) < top_p:
            nucleus[i] = weights[i] / total
    mass = math.fsum(nucleus.values())
    return [nucleus.get(i, 0.0) / mass for i in range(len(logits))]


SETTINGS = [
    (1.0, 0, 1.0),
    (0.5, 0, 1.0),
    (1.7, 0, 1.0),
    (1.0, 1, 1.0),
    (1.0, 3, 1.0),
    (1.0, 50, 1.0),
    (1.0, 0, 0.01),
    (1.0, 0, 0.62),
    (0.7, 0, 0.93),
    (1.3, 4, 0.81),
    (0.0, 0, 1.0),
    (0.0, 3, 0.5),
]


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), SETTINGS)
def test_distribution_is_the_naive_one(temperature: float, top_k: int, top_p: float) -> None:
    logits = 3 * torch.randn(40, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    probs = distribution(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    expected = [naive_distribution(row, temperature, top_k, top_p) for row in logits.tolist()]
    assert probs.dtype == torch.float64
    np.testing.assert_allclose(probs.numpy(), np.array(expected), rtol=0, atol=1e-13)


@given(
    st.lists(st.integers(-3, 3), min_size=1, max_size=8),
    st.sampled_from([0.4, 1.0, 2.5]),
    st.integers(0, 9),
    st.sampled_from([0.013, 0.3141, 0.6183, 0.943, 1.0]),
)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_ties(logits: list[int], temperature: float, top_k: int, top_p: float) -> None:
    """Which of several equal tokens top-k keeps is free; how many, and their probabilities, is not."""
    values = [float(x) for x in logits]
    probs = distribution(torch.tensor(values), temperature=temperature, top_k=top_k, top_p=top_p).tolist()
    expected = naive_distribution(values, temperature, top_k, top_p)
    np.testing.assert_allclose(sorted(probs), sorted(expected), rtol=0, atol=1e-13)
    lowest_kept = min(x for x, p in zip(values, probs, strict=True) if p > 0)
    assert all(p > 0 for x, p in zip(values, probs, strict=True) if x > lowest_kept)


def test_top_p_keeps_the_lower_id_of_equal_tokens_and_stops_at_the_exact_mass() -> None:
    """Four tokens of 1/4: a mass of 1/2 is reached by two of them, a mass just above by three."""
    logits = torch.zeros(4)
    assert distribution(logits, temperature=1.0, top_p=0.5).tolist() == [0.5, 0.5, 0, 0]
    np.testing.assert_allclose(distribution(logits, temperature=1.0, top_p=0.500001), [1 / 3, 1 / 3, 1 / 3, 0])


def test_filters_leave_leading_dimensions_alone() -> None:
    logits = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(1))
    probs = distribution(logits, temperature=0.8, top_k=4, top_p=0.7)
    for b in range(2):
        for t in range(3):
            assert torch.equal(probs[b, t], distribution(logits[b, t], temperature=0.8, top_k=4, top_p=0.7))


def test_greedy_is_one_hot_at_the_argmax() -> None:
    logits = torch.tensor([[0.0, 5.0, 4.9], [1.0, 1.0, 0.0]])
    assert distribution(logits, temperature=0.0).tolist() == [[0, 1, 0], [1, 0, 0]]


def test_draft_filter() -> None:
    """``none`` applies the temperature to q, ``same`` the filters too; greedy drafting is greedy under both."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    filters = {"temperature": 0.5, "top_k": 2, "top_p": 0.99}
    both, none = Sampling(**filters, draft_filter="same"), Sampling(**filters, draft_filter="none")
    filtered = naive_distribution(logits.tolist(), 0.5, 2, 0.99)
    plain = naive_distribution(logits.tolist(), 0.5, 0, 1.0)
    for sampling in (both, none):
        np.testing.assert_allclose(sampling.target_probs(logits), filtered, atol=1e-13)
    np.testing.assert_allclose(both.draft_probs(logits), filtered, atol=1e-13)
    np.testing.assert_allclose(none.draft_probs(logits), plain, atol=1e-13)
    for name in ("same", "none"):
        greedy = Sampling(temperature=0.0, draft_filter=name)
        assert greedy.is_greedy
        assert greedy.draft_probs(logits).tolist() == [1, 0, 0, 0]
    assert not both.is_greedy


@pytest.mark.parametrize("name", ["same", "none"])
def test_sharpness_raises_q_to_a_power_and_leaves_p(name: str) -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    plain = Sampling(temperature=0.5, top_k=3, draft_filter=name)
    sharp = Sampling(temperature=0.5, top_k=3, draft_filter=name, sharpness=1.75)
    powers = plain.draft_probs(logits) ** 1.75
    np.testing.assert_allclose(sharp.draft_probs(logits), powers / powers.sum(), atol=1e-13)
    assert torch.equal(sharp.target_probs(logits), plain.target_probs(logits))
    greedy = Sampling(temperature=0.0, draft_filter=name, sharpness=1.75)
    assert greedy.draft_probs(logits).tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_p": float("nan")}, "top_p"),
        ({"draft_filter": "all"}, "draft_filter"),
        ({"sharpness": 0.0}, "sharpness"),
        ({"sharpness": float("inf")}, "sharpness"),
    ],
)
def test_values_out_of_range(arguments: dict[str, object], name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected .* got"):
        Sampling(**arguments)


# --- inversion ----------------------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from([0, 0, 1, 1, 2, 5]), min_size=1, max_size=9).filter(any))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_every_cell_maps_to_its_token(weights: list[int]) -> None:
    """Weights that add up to a power of two, so that cell borders are exact: u in [C_{v-1}, C_v) gives v."""
    total = 1 << (sum(weights) - 1).bit_length()
    weights = [*weights, total - sum(weights)]
    probs = torch.tensor([weights], dtype=torch.float64) / total
    left = 0
    for token, weight in enumerate(weights):
        if weight > 0:
            right = (left + weight) / total
            for u in (left / total, (left + weight / 2) / total, float(np.nextafter(right, 0.0))):
                assert invert_cdf(probs, torch.tensor([u], dtype=torch.float64)).tolist() == [token]
            left += weight


def test_totals_need_not_be_one() -> None:
    """A residual max(p - q, 0) is not normalised."""
    probs = torch.tensor([[0.0, 0.03, 0.0, 0.01]], dtype=torch.float64).expand(4, 4)
    uniforms = torch.tensor([0.0, 0.74, 0.76, BELOW_ONE], dtype=torch.float64)
    assert invert_cdf(probs, uniforms).tolist() == [1, 1, 3, 3]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("probs", [[0.3, 0.7, 0.0, 0.0], [0.0, 0.1, 0.0, 0.2], [1.0, 0.0, 0.0, 0.0], [0.1] * 10])
def test_the_largest_uniform_gives_the_last_token_with_mass(probs: list[float], dtype: torch.dtype) -> None:
    """In float32 the largest number below one rounds to one: even that must not fall on a token without mass."""
    last = max(i for i, p in enumerate(probs) if p > 0)
    row = torch.tensor([probs], dtype=dtype)
    assert invert_cdf(row, torch.tensor([BELOW_ONE], dtype=torch.float64)).tolist() == [last]


def test_rows_are_inverted_by_themselves() -> None:
    """One row at the edge must not change its neighbours."""
    probs = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.0, 0.8], [0.0, 1.0, 0.0]])
    uniforms = torch.tensor([BELOW_ONE, 0.1, BELOW_ONE], dtype=torch.float64)
    assert invert_cdf(probs, uniforms).tolist() == [1, 0, 1]


@given(st.integers(0, 2**32), st.integers(1, 400))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_tokens_without_mass_are_never_drawn(seed: int, size: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    probs = torch.randn(64, size, generator=generator).mul(30).softmax(-1)  # float32: many tokens underflow to zero
    uniforms = torch.rand(64, generator=generator, dtype=torch.float64)
    uniforms[:2] = torch.tensor([0.0, BELOW_ONE])
    tokens = invert_cdf(probs, uniforms)
    assert bool((probs.gather(1, tokens[:, None]) > 0).all())


def test_frequencies_over_equally_spaced_uniforms() -> None:
    probs = torch.rand(9, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    probs = probs / probs.sum()
    num = 10_000
    tokens = invert_cdf(probs.expand(num, 9), (torch.arange(num, dtype=torch.float64) + 0.5) / num)
    frequencies = torch.bincount(tokens, minlength=9).double() / num
    np.testing.assert_allclose(frequencies, probs, atol=1.01 / num)


# --- generators ---------------------------------------------------------------------------------------------------


def draws(seed: int, prompt_id: str, turn: int, num: int = 4) -> list[float]:
    return torch.rand(num, generator=row_generator(seed, prompt_id, turn), dtype=torch.float64).tolist()


def test_generators_are_stable_over_time() -> None:
    """Recorded once: a change here makes every published result of a seed unrepeatable."""
    np.testing.assert_allclose(draws(0, "humaneval-0", 1, 2), GOLDEN, rtol=0, atol=0)


def test_seed_prompt_and_turn_each_give_another_stream() -> None:
    names = [(0, "a", 1), (1, "a", 1), (0, "b", 1), (0, "a", 2), (0, "a1", 1), (0, "a", 11), (10, "a", 1), (0, "", 1)]
    first = {name: tuple(draws(*name)) for name in names}
    assert len(set(first.values())) == len(names)
    assert all(tuple(draws(*name)) == stream for name, stream in first.items())


def test_many_prompts_do_not_collide() -> None:
    assert len({draws(0, f"gsm8k-{i}", 0, 1)[0] for i in range(1500)}) == 1500


def test_generators_leave_the_global_one_and_each_other_alone() -> None:
    state = torch.get_rng_state()
    one, other = row_generator(0, "a", 0), row_generator(0, "b", 0)
    torch.rand(100, generator=one)
    assert torch.rand(4, generator=other, dtype=torch.float64).tolist() == draws(0, "b", 0)
    assert torch.equal(torch.get_rng_state(), state)


def test_streams_of_neighbours_are_uncorrelated() -> None:
    streams = torch.tensor([draws(0, f"p{i}", 0, 64) for i in range(64)], dtype=torch.float64)
    correlations = torch.corrcoef(streams)[~torch.eye(64, dtype=torch.bool)]
    assert float(correlations.abs().max()) < 0.6  # 4.7 standard deviations of a pair's correlation, 1 / sqrt(63)
    assert float(streams.mean()) == pytest.approx(0.5, abs=5 / math.sqrt(12 * 64 * 64))
