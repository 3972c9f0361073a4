"""token_stats against a loop over (depth, row, anchor), and what it must leave alone."""

from __future__ import annotations

from dataclasses import dataclass, fields

import pytest
import torch
from naive_stats import naive_stats
from torch import Tensor

from lkspec.losses.fused.token_stats import token_stats
from lkspec.losses.objectives import JensenShannon, jensen_shannon
from lkspec.types import Batch, LinearHead, TokenStats
from lkspec.vocab import DraftVocab

K, B, T, H, HT, V = 3, 2, 12, 4, 5, 11
VOCAB = DraftVocab(torch.tensor([0, 2, 3, 5, 8, 9]), V)
NAMES = ("kl", "reverse_kl", "log_alpha", "accept_prob", "top1", "hit", "coverage")
#: Turns that end in the row, at its end, and that are too short for the deeper depths.
TURNS = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 0, 2, 2, 2, 0], [0, 1, 1, 1, 0, 0, 2, 2, 2, 2, 2, 2]])


@dataclass(frozen=True)
class Case:
    hidden: Tensor
    heads: list[LinearHead]
    target_hidden: Tensor
    target_head: LinearHead
    tokens: Tensor
    mask: Tensor

    def stats(self, **options) -> TokenStats:
        return token_stats(
            self.hidden, self.heads, self.target_hidden, self.target_head, VOCAB, self.tokens, self.mask, **options
        )

    @property
    def leaves(self) -> list[Tensor]:
        return [self.hidden, *{id(head): head.weight for head in self.heads}.values()]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_case(*, shared: bool = True) -> Case:
    weights = [normal(VOCAB.size, H, seed=10 + depth).requires_grad_() for depth in range(1 if shared else K)]
    heads = [LinearHead(weight) for weight in weights] * (K if shared else 1)
    tokens = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(3))
    batch = Batch(tokens=tokens, positions=tokens, segments=tokens, turns=TURNS, ids=(("a",), ("b",)))
    return Case(
        hidden=normal(K, B, T, H, seed=1).requires_grad_(),
        heads=heads,
        target_hidden=normal(B, T, HT, seed=2),
        target_head=LinearHead(normal(V, HT, seed=4), bias=normal(V, seed=5), scale=0.7, soft_cap=5.0),
        tokens=tokens,
        mask=batch.depth_mask(K),
    )


def naive(case: Case, temperature: Tensor | None = None) -> dict[str, Tensor]:
    """Depth k at anchor t proposes x_{t+1+k}; its target distribution is the target's row t + k."""
    columns = {name: [] for name in NAMES}
    for depth, row, anchor in case.mask.nonzero().tolist():
        k = depth + 1
        z_q = case.heads[depth].logits(case.hidden[depth, row, anchor])
        z_p = case.target_head.logits(case.target_hidden[row, anchor + k])
        divisor = 1.0 if temperature is None else float(temperature[row, anchor + k])
        row_stats = naive_stats(z_q, z_p, int(case.tokens[row, anchor + 1 + k]), VOCAB, divisor)
        for name in NAMES:
            columns[name].append(row_stats[name])
    full = {}
    for name, values in columns.items():
        full[name] = torch.zeros(case.mask.shape, dtype=torch.float64)
        full[name][case.mask] = torch.stack(values)
    return full


def gradients(case: Case, stats: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Of a loss that weighs every entry of every differentiable statistic differently."""
    names = ("kl", "reverse_kl", "log_alpha")
    loss = sum((stats[name] * normal(K, B, T, seed=20 + i)).sum() for i, name in enumerate(names))
    return torch.autograd.grad(loss, case.leaves)


def as_dict(stats: TokenStats) -> dict[str, Tensor]:
    return {name: getattr(stats, name) for name in NAMES}


@pytest.mark.parametrize("chunk_size", [1, 4, 1000])
@pytest.mark.parametrize("shared", [True, False], ids=["shared_head", "head_per_depth"])
def test_equals_naive_loop(shared: bool, chunk_size: int):
    case = make_case(shared=shared)
    assert case.mask.sum((1, 2)).tolist() == [13, 9, 5]
    stats = as_dict(case.stats(chunk_size=chunk_size))
    expected = naive(case)
    for name in NAMES:
        assert torch.allclose(stats[name], expected[name], atol=1e-12), name
    for ours, theirs in zip(gradients(case, stats), gradients(case, expected), strict=True):
        assert (ours - theirs).norm() < 1e-10 * theirs.norm()


def test_temperature():
    case = make_case()
    by_row = torch.linspace(0.4, 1.6, B * T, dtype=torch.float64).view(B, T)
    for temperature, values in ((0.5, torch.full((B, T), 0.5)), (by_row, by_row)):
        stats, expected = case.stats(temperature=temperature), naive(case, values)
        for name in NAMES:
            assert torch.allclose(getattr(stats, name), expected[name], atol=1e-12), name


def test_masked_off_entries_may_hold_anything():
    case = make_case(shared=False)
    used = torch.zeros(B, T, dtype=torch.bool)
    for depth, row, anchor in case.mask.nonzero().tolist():
        used[row, anchor + depth + 1] = True
    hidden = case.hidden.detach().masked_fill(~case.mask[..., None], float("nan")).requires_grad_()
    target_hidden = case.target_hidden.masked_fill(~used[..., None], float("nan"))
    poisoned = Case(hidden, case.heads, target_hidden, case.target_head, case.tokens, case.mask)
    clean_stats, poisoned_stats = (as_dict(c.stats(chunk_size=4)) for c in (case, poisoned))
    for name in NAMES:
        assert torch.equal(clean_stats[name], poisoned_stats[name]), name
        assert torch.equal(poisoned_stats[name][~case.mask], torch.zeros(int((~case.mask).sum())).double()), name
    clean_gradients, poisoned_gradients = gradients(case, clean_stats), gradients(poisoned, poisoned_stats)
    for ours, theirs in zip(poisoned_gradients, clean_gradients, strict=True):
        assert torch.equal(ours, theirs)
    assert not poisoned_gradients[0][~case.mask].any()


def test_empty_mask_backpropagates_zeros():
    case = make_case()
    empty = Case(*(getattr(case, f.name) for f in fields(case)[:-1]), mask=torch.zeros_like(case.mask))
    stats = as_dict(empty.stats())
    assert all(not values.any() and values.shape == (K, B, T) for values in stats.values())
    for slope in gradients(empty, stats):
        assert not slope.any()


def test_more_depths_than_slots():
    stats = token_stats(
        torch.ones(5, 1, 3, H, dtype=torch.float64),
        [LinearHead(normal(VOCAB.size, H, seed=1))] * 5,
        normal(1, 3, HT, seed=2),
        LinearHead(normal(V, HT, seed=3)),
        VOCAB,
        torch.tensor([[1, 2, 3]]),
        torch.tensor([[[True, False, False]]] + [[[False] * 3]] * 4),
    )
    assert (stats.log_alpha != 0).sum() == 1


def test_row_value_runs_over_the_same_chunks():
    case = make_case()
    stats = case.stats(row_value=JensenShannon().row_value, chunk_size=4)
    expected = torch.zeros_like(stats.kl)
    for depth, row, anchor in case.mask.nonzero().tolist():
        z_p = case.target_head.logits(case.target_hidden[row, anchor + depth + 1])
        logq = case.heads[depth].logits(case.hidden[depth, row, anchor]).log_softmax(-1)
        expected[depth, row, anchor] = jensen_shannon(z_p.log_softmax(-1)[VOCAB.ids][None], logq[None])[0]
    assert stats.row_value is not None
    assert torch.allclose(stats.row_value, expected, atol=1e-12)
    ours, theirs = (torch.autograd.grad(values.sum(), case.leaves) for values in (stats.row_value, expected))
    for one, two in zip(ours, theirs, strict=True):
        assert torch.allclose(one, two, atol=1e-10)
    assert case.stats().row_value is None


def test_no_gradient_reaches_the_target():
    case = make_case()
    target_hidden = case.target_hidden.clone().requires_grad_()
    weight = case.target_head.weight.clone().requires_grad_()
    stats = token_stats(case.hidden, case.heads, target_hidden, LinearHead(weight), VOCAB, case.tokens, case.mask)
    (stats.kl.sum() + stats.log_alpha.sum()).backward()
    assert target_hidden.grad is None
    assert weight.grad is None
    assert case.hidden.grad is not None


def test_refuses_what_does_not_fit():
    case = make_case()
    with pytest.raises(ValueError, match="one a depth, 3, got 2"):
        token_stats(case.hidden, case.heads[:2], case.target_hidden, case.target_head, VOCAB, case.tokens, case.mask)
    with pytest.raises(ValueError, match="chunk_size"):
        case.stats(chunk_size=0)
    with pytest.raises(ValueError, match="temperature: expected positive numbers, got 0; T = 0 is what"):
        case.stats(temperature=0.0)
    with pytest.raises(ValueError, match=rf"temperature: expected one number or \({B}, {T}\), got \({T},\)"):
        case.stats(temperature=torch.ones(T))
    for anchor in (T - 2, T - 1):  # x_{t+2} does not exist
        past_end = torch.zeros_like(case.mask)
        past_end[0, 0, anchor] = True
        with pytest.raises(AssertionError, match="past the end"):
            token_stats(case.hidden, case.heads, case.target_hidden, case.target_head, VOCAB, case.tokens, past_end)
