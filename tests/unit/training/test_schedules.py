from __future__ import annotations

import math

import pytest
import torch

from lkspec.training.schedules import cosine_with_warmup

PEAK = 3e-4


def learning_rates(num_steps: int, *, num_taken: int | None = None, **options: float) -> list[float]:
    """The learning rate of each optimiser step."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    schedule = cosine_with_warmup(optimizer, num_steps, **options)
    rates = []
    for _ in range(num_steps if num_taken is None else num_taken):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize(
    ("num_steps", "num_warmup"), [(10, 1), (100, 5), (400, 20), (1000, 50), (2000, 100), (2400, 100), (5000, 100)]
)
def test_warm_up_takes_5_percent_but_at_most_100_steps(num_steps, num_warmup):
    rates = learning_rates(num_steps, num_taken=num_warmup + 2)
    assert rates[:num_warmup] == pytest.approx([PEAK * (i + 1) / num_warmup for i in range(num_warmup)], rel=1e-12)
    assert rates[num_warmup - 1] == pytest.approx(PEAK, rel=1e-12)  # the peak is reached by the last warm-up step
    assert rates[num_warmup] == pytest.approx(PEAK, rel=1e-12)
    assert rates[num_warmup + 1] < PEAK


@pytest.mark.parametrize("final_share", [0.0, 0.1])
def test_half_a_cosine_follows(final_share):
    num_steps, num_warmup = 200, 10
    rates = learning_rates(num_steps, num_taken=num_steps + 1, final_share=final_share)
    low = final_share * PEAK
    for step in range(num_warmup, num_steps + 1):
        # cos^2 of half the angle: the same curve by another identity.
        share = math.cos(0.5 * math.pi * (step - num_warmup) / (num_steps - num_warmup)) ** 2
        assert rates[step] == pytest.approx(low + (PEAK - low) * share, rel=1e-9, abs=1e-18)
    assert rates[(num_steps + num_warmup) // 2] == pytest.approx((PEAK + low) / 2, rel=1e-9)
    assert rates[num_steps] == pytest.approx(low, abs=1e-18)


def test_the_end_is_held():
    rates = learning_rates(40, num_taken=60, final_share=0.25)
    assert rates[40:] == pytest.approx([0.25 * PEAK] * 20, rel=1e-12)


def test_warm_up_can_be_chosen():
    rates = learning_rates(100, max_warmup_steps=4, warmup_share=0.5)
    assert rates[:5] == pytest.approx([PEAK / 4, PEAK / 2, 3 * PEAK / 4, PEAK, PEAK], rel=1e-12)


@pytest.mark.parametrize("num_steps", [1, 2])
def test_the_shortest_runs_begin_at_the_peak(num_steps):
    rates = learning_rates(num_steps)
    assert rates[0] == pytest.approx(PEAK)
    assert all(0 <= rate <= PEAK for rate in rates)
