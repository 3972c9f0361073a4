"""logit_stats against naive float64 formulas, and at the edges where naive formulas break."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_stats import lk_gradient, naive_stats

from lkspec.losses.divergences import LOG_ZERO, logit_stats
from lkspec.vocab import DraftVocab

VOCAB = DraftVocab(torch.tensor([1, 2, 4, 7, 8]), 10)
FULL = DraftVocab.full(10)
LOSSES = ("kl", "reverse_kl", "log_alpha")


def random_logits(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def gradient(loss: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss.sum(), logits, retain_graph=True)[0]


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
@pytest.mark.parametrize("vocab", [VOCAB, FULL], ids=["truncated", "full"])
def test_values_equal_naive_formulas(vocab: DraftVocab, temperature: float):
    z_q, z_p = random_logits(2, 3, vocab.size, seed=0), random_logits(2, 3, 10, seed=1)
    tokens = torch.tensor([[0, 1, 2], [4, 5, 8]])
    stats = logit_stats(z_q, z_p, tokens, vocab, temperature=temperature)
    for row in range(2):
        for column in range(3):
            expected = naive_stats(z_q[row, column], z_p[row, column], int(tokens[row, column]), vocab, temperature)
            assert stats.keys() == expected.keys()
            for name, value in expected.items():
                assert stats[name][row, column].item() == pytest.approx(value.item(), abs=1e-12), name


@pytest.mark.parametrize("vocab", [VOCAB, FULL], ids=["truncated", "full"])
def test_gradients_equal_closed_forms(vocab: DraftVocab):
    z_q, z_p = random_logits(vocab.size, seed=2).requires_grad_(), random_logits(10, seed=3)
    stats = logit_stats(z_q, z_p, torch.tensor(4), vocab)
    q, p_inside = z_q.detach().softmax(0), z_p.softmax(0)[vocab.ids]
    p_renormed = p_inside / p_inside.sum()
    alpha, alpha_gradient = lk_gradient(p_inside, q)
    log_ratio = (q / p_renormed).log()
    expected = {
        "kl": q - p_renormed,
        "log_alpha": alpha_gradient / alpha,
        "reverse_kl": q * (log_ratio - (q * log_ratio).sum()),
    }
    for name, closed_form in expected.items():
        difference = gradient(stats[name], z_q) - closed_form
        assert difference.norm() < 1e-12 * max(1, closed_form.norm()), name


def test_ties_count_as_the_target():
    """M_v = 1[q_v < p_v] is strict: of p = (1/2, 1/4, 1/4), q = (1/4, 1/4, 1/2), only the first is below."""
    z_q = torch.tensor([0.25, 0.25, 0.5], dtype=torch.float64).log().requires_grad_()
    z_p = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64).log()
    stats = logit_stats(z_q, z_p, torch.tensor(0), DraftVocab.full(3))
    m, alpha = 0.25, 0.75
    expected = torch.tensor([0.25 * (1 - m), 0.25 * -m, 0.5 * -m], dtype=torch.float64) / alpha
    assert torch.allclose(gradient(stats["log_alpha"], z_q), expected, atol=1e-12)


@pytest.mark.parametrize("num_likely", [4, 64])
def test_diffuse_draft(num_likely: int):
    """q = 1/V against p = 1/k on k tokens: the TV gradient vanishes with k/V, those of KL and -log alpha do not."""
    size = 4096
    z_q = torch.zeros(size, dtype=torch.float64, requires_grad=True)
    z_p = torch.full((size,), -torch.inf, dtype=torch.float64)
    z_p[:num_likely] = 0.0
    stats = logit_stats(z_q, z_p, torch.tensor(0), DraftVocab.full(size))
    assert stats["log_alpha"].exp().item() == pytest.approx(num_likely / size)
    norms = {
        "kl": gradient(stats["kl"], z_q).norm().item() * math.sqrt(num_likely),
        "tv": gradient(-torch.expm1(stats["log_alpha"]), z_q).norm().item() * size / math.sqrt(num_likely),
        "lk_alpha": gradient(-stats["log_alpha"], z_q).norm().item() * math.sqrt(num_likely),
    }
    for name, order in norms.items():
        assert 0.95 < order < 1.01, name


@pytest.mark.parametrize("gap", [30.0, 100.0, 300.0])
def test_disjoint_supports_in_float32(gap: float):
    """q underflows in float32 from gap 104 on; loss and gradient must be those of float64."""
    z_p = torch.tensor([gap, 0.0, 1.0, 0.5], dtype=torch.float32)
    z_q = torch.tensor([0.0, gap, 0.5, 1.0], dtype=torch.float32, requires_grad=True)
    p, q = z_p.double().softmax(0), z_q.detach().double().softmax(0)
    alpha, alpha_gradient = lk_gradient(p, q)
    stats = logit_stats(z_q, z_p, torch.tensor(0), DraftVocab.full(4))
    assert stats["log_alpha"].item() == pytest.approx(alpha.log().item(), rel=1e-6)
    assert (gradient(stats["log_alpha"], z_q) - alpha_gradient / alpha).norm() < 1e-4
    assert gradient(-torch.expm1(stats["log_alpha"]), z_q).isfinite().all()


def test_alpha_below_the_range_of_float64():
    """Two tokens, gap g: alpha = 2 exp(-g) / (1 + exp(-g)), and d -log alpha / dz = (-1/2, 1/2)."""
    gap = 5000.0
    z_q = torch.tensor([-gap, 0.0], requires_grad=True)
    stats = logit_stats(z_q, torch.tensor([0.0, -gap]), torch.tensor(0), DraftVocab.full(2))
    assert stats["log_alpha"].item() == pytest.approx(math.log(2) - gap)
    # float32 knows a log_alpha near -5000 to 2.4e-4, and the gradient is relative to exp(log_alpha).
    assert torch.allclose(gradient(-stats["log_alpha"], z_q), torch.tensor([-0.5, 0.5]), atol=5e-4)


@pytest.mark.parametrize("vocab", [VOCAB, FULL], ids=["truncated", "full"])
def test_draft_equal_to_the_renormalised_target(vocab: DraftVocab):
    z_p = random_logits(10, seed=4)
    z_q = (z_p[vocab.ids] + 3.0).requires_grad_()
    stats = logit_stats(z_q, z_p, torch.tensor(4), vocab)
    coverage = z_p.softmax(0)[vocab.ids].sum().item()
    assert stats["kl"].item() == pytest.approx(0, abs=1e-12)
    assert stats["reverse_kl"].item() == pytest.approx(0, abs=1e-12)
    assert stats["coverage"].item() == pytest.approx(coverage, abs=1e-12)
    assert stats["log_alpha"].exp().item() == pytest.approx(coverage, abs=1e-12)
    assert gradient(stats["kl"], z_q).norm() < 1e-12


def test_point_mass_target():
    """At a point mass on x*: -log alpha = KL = -log q(x*), and their gradients are q - onehot."""
    z_q = random_logits(5, seed=5, dtype=torch.float32).requires_grad_()
    z_p = torch.full((10,), -torch.inf)
    z_p[4] = 3.0
    stats = logit_stats(z_q, z_p, torch.tensor(4), VOCAB)
    q = z_q.detach().softmax(0)
    expected_gradient = q - torch.nn.functional.one_hot(torch.tensor(2), 5)
    for name, loss in (("kl", stats["kl"]), ("lk_alpha", -stats["log_alpha"])):
        assert loss.item() == pytest.approx(-q[2].log().item(), rel=1e-6), name
        assert torch.allclose(gradient(loss, z_q), expected_gradient, atol=1e-6), name
    assert stats["reverse_kl"].isfinite()
    assert gradient(stats["reverse_kl"], z_q).isfinite().all()
    assert stats["accept_prob"].item() == pytest.approx(q[2].item(), rel=1e-6)


def test_uniform_draft_against_a_point_mass_is_no_dead_zone():
    z_q = torch.zeros(128_000, requires_grad=True)
    z_p = torch.full((128_000,), -torch.inf)
    z_p[77] = 0.0
    stats = logit_stats(z_q, z_p, torch.tensor(77), DraftVocab.full(128_000))
    assert stats["log_alpha"].item() == pytest.approx(-math.log(128_000), rel=1e-6)
    assert gradient(-stats["log_alpha"], z_q)[77].item() == pytest.approx(-1, abs=1e-4)


def test_no_target_mass_inside_the_draft_vocabulary():
    """Nothing to learn: alpha = 0 whatever q is, p~ does not exist."""
    z_q = random_logits(5, seed=6, dtype=torch.float32).requires_grad_()
    z_p = torch.full((10,), -torch.inf)
    z_p[0] = 0.0
    stats = logit_stats(z_q, z_p, torch.tensor(0), VOCAB)
    assert stats["log_alpha"].item() == LOG_ZERO
    assert stats["coverage"].item() == stats["accept_prob"].item() == 0
    assert stats["kl"].item() == stats["reverse_kl"].item() == 0
    for name in LOSSES:
        assert torch.equal(gradient(stats[name], z_q), torch.zeros(5)), name


def test_no_gradient_reaches_the_target_logits():
    z_q, z_p = random_logits(5, seed=11).requires_grad_(), random_logits(10, seed=12).requires_grad_()
    stats = logit_stats(z_q, z_p, torch.tensor(4), VOCAB)
    (stats["kl"] + stats["reverse_kl"] + stats["log_alpha"] + stats["accept_prob"]).backward()
    assert z_q.grad is not None
    assert z_p.grad is None
    assert not stats["coverage"].requires_grad


def test_top1_and_hit_use_the_full_vocabulary():
    """The target's argmax (token 0) cannot be proposed: no credit for the best of the rest; x = 7 is hit."""
    z_p = torch.tensor([5.0, 0, 0, 0, 0, 0, 0, 3, 0, 0])
    z_q = torch.tensor([0.0, 0, 0, 9, 0])  # argmax: target id 7
    stats = logit_stats(z_q.expand(2, 5), torch.stack([z_p, z_p.roll(7)]), torch.tensor([7, 8]), VOCAB)
    assert stats["top1"].tolist() == [0.0, 1.0]
    assert stats["hit"].tolist() == [1.0, 0.0]


def test_bfloat16_is_computed_in_float32():
    z_q, z_p = random_logits(5, seed=7, dtype=torch.bfloat16), random_logits(10, seed=8, dtype=torch.bfloat16)
    stats = logit_stats(z_q, z_p, torch.tensor(4), VOCAB)
    expected = naive_stats(z_q, z_p, 4, VOCAB)
    for name, value in expected.items():
        assert stats[name].dtype == torch.float32
        assert stats[name].item() == pytest.approx(value.item(), abs=1e-5), name


def test_row_value_sees_the_original_p():
    z_q, z_p = random_logits(3, 5, seed=9), random_logits(3, 10, seed=10)
    stats = logit_stats(z_q, z_p, torch.zeros(3, dtype=torch.int64), VOCAB, row_value=lambda p, q: (p + 2 * q).sum(-1))
    expected = z_p.softmax(-1)[:, VOCAB.ids].log().sum(-1) + 2 * z_q.softmax(-1).log().sum(-1)
    assert torch.allclose(stats["row_value"], expected)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_temperature_must_be_positive(temperature: float):
    with pytest.raises(ValueError, match="temperature"):
        logit_stats(torch.zeros(5), torch.zeros(10), torch.tensor(0), VOCAB, temperature=temperature)


logits_of = st.lists(st.floats(-40, 40), min_size=10, max_size=10).map(lambda z: torch.tensor(z, dtype=torch.float64))
subsets = st.sets(st.integers(0, 9), min_size=1).map(lambda ids: DraftVocab(torch.tensor(sorted(ids)), 10))


@settings(deadline=None, max_examples=60)
@given(z_p=logits_of, z_q=logits_of, vocab=subsets, token=st.integers(0, 9))
def test_bounds(z_p: torch.Tensor, z_q: torch.Tensor, vocab: DraftVocab, token: int):
    z_q = z_q[vocab.ids].requires_grad_()
    stats = logit_stats(z_q, z_p, torch.tensor(token), vocab)
    alpha, coverage = stats["log_alpha"].exp().item(), stats["coverage"].item()
    assert 0 < alpha <= coverage + 1e-12
    assert coverage <= 1 + 1e-12
    assert stats["kl"].item() >= -1e-12
    assert stats["reverse_kl"].item() >= -1e-12
    assert 0 <= stats["accept_prob"].item() <= 1
    for name in LOSSES:
        slope = gradient(stats[name], z_q)
        assert slope.isfinite().all()
        assert abs(slope.sum().item()) < 1e-9, "a softmax does not see a constant shift"


@settings(deadline=None, max_examples=60)
@given(z_p=logits_of, z_q=logits_of)
def test_pinsker(z_p: torch.Tensor, z_q: torch.Tensor):
    stats = logit_stats(z_q, z_p, torch.tensor(0), FULL)
    tv = 1 - stats["log_alpha"].exp().item()
    assert tv <= math.sqrt(max(stats["kl"].item(), 0) / 2) + 1e-6
    assert tv <= math.sqrt(max(stats["reverse_kl"].item(), 0) / 2) + 1e-6


@settings(deadline=None, max_examples=30)
@given(z_p=logits_of, z_q=logits_of, shift_p=st.floats(-100, 100), shift_q=st.floats(-100, 100))
def test_shifts_of_logits_change_nothing(z_p: torch.Tensor, z_q: torch.Tensor, shift_p: float, shift_q: float):
    one = logit_stats(z_q[VOCAB.ids], z_p, torch.tensor(4), VOCAB)
    two = logit_stats(z_q[VOCAB.ids] + shift_q, z_p + shift_p, torch.tensor(4), VOCAB)
    for name in (*LOSSES, "accept_prob", "coverage"):
        assert one[name].item() == pytest.approx(two[name].item(), abs=1e-9), name
