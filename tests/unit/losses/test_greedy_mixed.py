"""The objective that trains for greedy decoding as well."""

from __future__ import annotations

import pytest
import torch
from fused_cases import FULL, TRUNCATED, assert_close, counts, gradients, in_forward, make_case

from lkspec.losses.divergences import logit_stats
from lkspec.losses.objectives import KL, JensenShannon, LKAlpha, LKLambda, Objective, reduce_loss
from lkspec.losses.wrapping import GreedyMixed
from lkspec.types import TokenStats
from lkspec.vocab import DraftVocab

BASES = [KL(), LKAlpha(), LKLambda(fixed_lambda=0.3)]


def value_and_slopes(objective: Objective, draft: torch.Tensor, target: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Of one row of logits in float64."""
    leaf = draft.double().clone().requires_grad_()
    vocab, tokens = DraftVocab.full(len(draft)), torch.zeros(1, dtype=torch.int64)
    stats = logit_stats(leaf[None], target.double()[None], tokens, vocab, row_value=objective.row_value)
    placed = {name: value[None, None] for name, value in stats.items()}
    value = objective.values(TokenStats(mask=torch.ones(1, 1, 1, dtype=torch.bool), **placed), torch.zeros(1)).sum()
    return value.item(), torch.autograd.grad(value, leaf)[0]


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_value_and_slopes_by_hand(share: float):
    """-log q(x*) has the slope q - 1[x*]; lk_alpha that of its closed form."""
    target, draft = torch.tensor([0.5, 0.3, 0.2]).log(), torch.tensor([0.3, 0.1, 0.6]).log()
    value, slopes = value_and_slopes(GreedyMixed(LKAlpha(), share=share), draft, target)
    q, below = torch.tensor([0.3, 0.1, 0.6]).double(), torch.tensor([1.0, 1.0, 0.0]).double()
    alpha = 0.3 + 0.1 + 0.2
    assert value == pytest.approx((1 - share) * -torch.tensor(alpha).log().item() - share * q[0].log().item(), abs=1e-6)
    greedy = q - torch.tensor([1.0, 0.0, 0.0])
    assert torch.allclose(slopes, share * greedy - (1 - share) * q * (below - 0.4) / alpha, atol=1e-6)


def test_against_a_point_mass_it_is_lk_alpha_whatever_the_share():
    target, draft = torch.tensor([0.0, 60.0, 0.0, 0.0]), torch.tensor([1.0, 0.2, -0.5, 0.3])
    plain = value_and_slopes(LKAlpha(), draft, target)
    for share in (0.0, 0.4, 1.0):
        value, slopes = value_and_slopes(GreedyMixed(LKAlpha(), share=share), draft, target)
        assert value == pytest.approx(plain[0])
        assert torch.allclose(slopes, plain[1])


@pytest.mark.parametrize("base", BASES, ids=repr)
@pytest.mark.parametrize("vocab", [TRUNCATED, FULL], ids=["truncated", "full"])
def test_the_fused_loss_equals_the_readable_one(vocab: DraftVocab, base: Objective):
    case, objective = make_case(vocab=vocab, heads="ABA", shaped=True), GreedyMixed(base, share=0.3)
    unused = torch.zeros(len(case.mask))
    readable = case.reference(row_value=objective.row_value)
    theirs = reduce_loss(objective.values(readable, unused), case.mask, counts(case))
    expected = gradients(case, theirs)
    for summary in (None, case.summary):
        promised = in_forward(objective, case)
        stats = case.fused(in_forward=promised, row_value=objective.row_value, target_summary=summary)
        assert stats.value is not None
        ours = reduce_loss(stats.value, case.mask, counts(case))
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
        for one, two in zip(gradients(case, ours), expected, strict=True):
            assert_close(one, two, 1e-5)


def test_settings_of_the_base_stay():
    base = LKLambda(eta=3.0)
    objective = GreedyMixed(base)
    assert objective.scope == base.scope
    assert objective.comparison((2, 3)) == base.comparison((2, 3))
    assert objective.scalars(torch.ones(2)).keys() == base.scalars(torch.ones(2)).keys()


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_outside_0_to_1_is_refused(share: float):
    with pytest.raises(ValueError, match="share must lie in"):
        GreedyMixed(KL(), share=share)


def test_a_base_with_a_value_a_row_is_refused():
    with pytest.raises(ValueError, match="jsd has a value a row of its own"):
        GreedyMixed(JensenShannon())
