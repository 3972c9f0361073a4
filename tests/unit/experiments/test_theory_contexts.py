"""One q for many contexts: exact optima by their conditions, and by exhaustive search on a grid."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from theory_contexts import acceptance, agreement, best_draft, shared_draft, sharpening, zipf_contexts
from theory_figures import shared_drafts_figure
from torch import Tensor

from lkspec.losses.objectives import KL, TV, LKAlpha, LKLambda, Objective

GRID = [1 + step / 20 for step in range(41)]


def contexts(num_contexts: int, *, seed: int = 0, num_groups: int = 6) -> Tensor:
    return zipf_contexts(num_groups, num_contexts, 12, concentration=2.0, seed=seed)


@given(st.integers(1, 7), st.integers(0, 100))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_the_best_q_is_a_common_quantile(num_contexts: int, seed: int) -> None:
    """The condition of the optimum: a c with P(p_v > q_v) <= c for all tokens, P(p_v >= q_v) >= c where q_v > 0."""
    targets = contexts(num_contexts, seed=seed)
    draft = best_draft(targets)
    assert draft.sum(-1).tolist() == pytest.approx([1.0] * len(draft), abs=1e-12)
    above = (targets > draft[:, None] + 1e-12).double().mean(1)
    at_least = (targets >= draft[:, None] - 1e-12).double().mean(1).masked_fill(draft <= 1e-12, 1.0)
    assert (above.max(-1).values <= at_least.min(-1).values + 1e-12).all()


def test_no_q_of_a_grid_is_accepted_more() -> None:
    targets = zipf_contexts(5, 4, 3, concentration=2.0)
    steps = 40
    grid = [(i / steps, j / steps, (steps - i - j) / steps) for i, j in itertools.product(range(steps + 1), repeat=2)]
    for number, group in enumerate(targets):
        others = torch.tensor([q for q in grid if min(q) >= 0], dtype=torch.float64)
        found = acceptance(group.expand(len(others), *group.shape), others)
        best = float(acceptance(group[None], best_draft(group[None])))
        assert best >= float(found.max()) - 1e-12, number
        assert best - float(found.max()) < 3 / steps, "nor far above what the grid can reach"


@pytest.mark.parametrize(("objective", "expected"), [(KL(), lambda p: p.mean(1)), (TV(), best_draft)], ids=["kl", "tv"])
def test_descent_finds_the_optima_that_are_known(objective: Objective, expected) -> None:
    targets = contexts(5)
    optimum = expected(targets)
    found = shared_draft(objective, targets)
    if isinstance(objective, KL):
        assert torch.allclose(found, optimum, atol=1e-4)
    assert acceptance(targets, found).tolist() == pytest.approx(acceptance(targets, optimum).tolist(), abs=2e-3)


def test_who_gains_what_as_more_contexts_are_confused() -> None:
    """Nothing where contexts are told apart or two share; sharpness gets more of what there is where more do."""
    for num_contexts, least, most in ((1, 0.0, 1e-9), (2, 0.0, 1e-9), (4, 0.0, 0.5), (32, 0.5, 0.95)):
        targets = zipf_contexts(20, num_contexts, 64, concentration=2.0)
        kl, best = sharpening(targets, targets.mean(1), GRID), sharpening(targets, best_draft(targets), GRID)
        assert best.sharpness == 1.0, "the optimum is not improved by sharpness"
        if num_contexts <= 2:
            assert best.alpha == pytest.approx(kl.sharpened, abs=1e-9)
        else:
            assert least < (kl.sharpened - kl.alpha) / (best.alpha - kl.alpha) < most


def test_lk_objectives_lie_between_kl_and_the_best_and_sharpness_helps_them_less() -> None:
    targets = zipf_contexts(10, 32, 48, concentration=2.0)
    kl, best = sharpening(targets, targets.mean(1), GRID), sharpening(targets, best_draft(targets), GRID)
    for objective in (LKAlpha(), LKLambda(10.0)):
        found = sharpening(targets, shared_draft(objective, targets), GRID)
        assert kl.alpha < found.alpha < best.alpha
        assert 0 < found.sharpened - found.alpha < kl.sharpened - kl.alpha
        assert 1 < found.sharpness < kl.sharpness


def test_agreement_counts_contexts_with_the_first_choice_of_the_draft() -> None:
    targets = torch.tensor([[[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.5, 0.1, 0.4]], [[0.0, 0.0, 1.0]] * 3])
    drafts = torch.tensor([[0.4, 0.35, 0.25], [0.4, 0.35, 0.25]])
    assert agreement(targets, drafts).tolist() == pytest.approx([2 / 3, 0.0])


def test_targets_are_distributions_and_the_same_for_a_seed() -> None:
    targets = contexts(3)
    assert torch.allclose(targets.sum(-1), torch.ones(6, 3, dtype=torch.float64))
    assert torch.equal(targets, contexts(3))
    assert not torch.equal(targets, contexts(3, seed=1))


def test_the_picture_has_a_panel_a_kind_of_target_and_a_line_a_draft() -> None:
    lines = {"kl, sharpened": [(0.5, 0.0), (0.3, 0.02)], "best q": [(0.5, 0.0), (0.3, 0.05)]}
    figure = shared_drafts_figure({"sure": lines, "unsure": lines})
    assert [axes.get_title() for axes in figure.axes] == ["sure", "unsure"]
    for axes in figure.axes:
        drawn = {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.lines}
        assert drawn == lines
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(lines)
