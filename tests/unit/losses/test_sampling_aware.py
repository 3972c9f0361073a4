"""Objectives that train against the target as it will be sampled: filtered, or at many temperatures."""

from __future__ import annotations

import math

import pytest
import torch

from lkspec.losses.divergences import logit_stats
from lkspec.losses.expected_length import ExpectedLength
from lkspec.losses.objectives import KL, TV, Comparison, JensenShannon, LKAlpha, LKLambda, Objective
from lkspec.losses.wrapping import FilterAware, TemperatureMixed
from lkspec.types import TokenStats
from lkspec.vocab import DraftVocab

BASES = [KL(), TV(), LKAlpha(), LKLambda(eta=3.0), JensenShannon(), ExpectedLength()]


def stats_at(comparison: Comparison, draft: torch.Tensor, target: torch.Tensor) -> TokenStats:
    """Of one row of logits."""
    found = logit_stats(
        draft[None],
        target[None],
        torch.zeros(1, dtype=torch.int64),
        DraftVocab.full(len(draft)),
        **comparison._asdict(),
    )
    return TokenStats(mask=torch.ones(1, 1, 1, dtype=torch.bool), **{k: v[None, None] for k, v in found.items()})


@pytest.mark.parametrize("base", BASES, ids=repr)
def test_everything_but_the_comparison_is_the_base(base: Objective):
    for objective in (FilterAware(base, top_p=0.5), TemperatureMixed(base)):
        assert objective.scope == base.scope
        assert objective.row_value is base.row_value
        assert objective.scalars(torch.ones(2)).keys() == base.scalars(torch.ones(2)).keys()
        assert base.describe() in objective.describe()


def test_filters_and_temperatures_combine():
    both = FilterAware(TemperatureMixed(KL(), low=0.5, high=0.5), top_k=3, top_p=0.8).comparison((2, 3))
    assert torch.equal(torch.as_tensor(both.temperature), torch.full((2, 3), 0.5))
    assert (both.top_k, both.top_p) == (3, 0.8)
    assert KL().comparison((2, 3)) == Comparison()


def test_filtered_alpha_by_hand():
    target, draft = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.2, 0.2, 0.6]).double()
    objective = FilterAware(TV(), top_p=0.7)  # keeps two: 5/8 and 3/8
    values = objective.values(stats_at(objective.comparison((1, 1)), draft.log(), target.log()), torch.zeros(1))
    assert values.item() == pytest.approx(1 - (0.2 + 0.2))
    plain = TV().values(stats_at(Comparison(), draft.log(), target.log()), torch.zeros(1))
    assert plain.item() == pytest.approx(1 - (0.2 + 0.2 + 0.2))


@pytest.mark.parametrize("base", [KL(), LKAlpha()], ids=repr)
@pytest.mark.parametrize("gap", [5.0, 50.0, 500.0])
def test_disjoint_supports_keep_a_useful_gradient(gap: float, base: Objective):
    """The filter keeps token 0 alone, the draft is sure of token 3: the slope raises token 0 and lowers token 3."""
    target = torch.tensor([3.0, 1.0, 0.0, 2.5])
    draft = torch.tensor([0.0, 0.0, 0.0, gap], requires_grad=True)
    objective = FilterAware(base, top_k=1)
    value = objective.values(stats_at(objective.comparison((1, 1)), draft, target), torch.zeros(1)).sum()
    (slope,) = torch.autograd.grad(value, draft)
    assert math.isfinite(value.item())
    assert slope.isfinite().all()
    assert slope[0] < -0.9
    assert slope[3] > 0.9


def test_temperatures_fill_their_range_and_follow_the_seed():
    objective = TemperatureMixed(KL(), low=0.25, high=0.75)
    torch.manual_seed(5)
    drawn = torch.as_tensor(objective.comparison((4, 100)).temperature)
    assert drawn.shape == (4, 100)
    assert drawn.min() >= 0.25
    assert drawn.max() <= 0.75
    assert drawn.max() - drawn.min() > 0.45
    assert drawn.mean().item() == pytest.approx(0.5, abs=0.03)  # 4 standard errors
    again = torch.as_tensor(objective.comparison((4, 100)).temperature)
    assert not torch.equal(again, drawn)
    torch.manual_seed(5)
    assert torch.equal(torch.as_tensor(objective.comparison((4, 100)).temperature), drawn)


@pytest.mark.parametrize("arguments", [{}, {"top_k": 0, "top_p": 1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_filter_aware_refuses(arguments: dict[str, float]):
    with pytest.raises(ValueError, match="top_"):
        FilterAware(KL(), **arguments)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-1.0, 1.0), (0.8, 0.5), (0.5, math.inf), (math.nan, 1.0)])
def test_temperature_mixed_refuses(low: float, high: float):
    with pytest.raises(ValueError, match="low"):
        TemperatureMixed(KL(), low=low, high=high)
