"""Inputs for tests of ``token_stats``, and what its results are compared with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from naive_stats import naive_stats
from torch import Tensor

from lkspec.losses.divergences import logit_stats
from lkspec.losses.fused.head_summary import head_summary
from lkspec.losses.fused.in_forward import InForward
from lkspec.losses.fused.token_stats import token_stats
from lkspec.losses.objectives import Objective
from lkspec.types import Batch, HeadSummary, LinearHead, TokenStats
from lkspec.vocab import DraftVocab

K, B, T, H, HT, V = 3, 2, 12, 4, 5, 11
TRUNCATED, FULL = DraftVocab(torch.tensor([0, 2, 3, 5, 8, 9]), V), DraftVocab.full(V)
#: Turns that end in the row, at its end, and that are too short for the deeper depths.
TURNS = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 0, 2, 2, 2, 0], [0, 1, 1, 1, 0, 0, 2, 2, 2, 2, 2, 2]])
#: One for each target row, all different.
TEMPERATURES = 0.4 + torch.arange(B * T).reshape(B, T) / 20
NAMES = ("kl", "reverse_kl", "log_alpha", "accept_prob", "top1", "hit", "coverage")
DIFFERENTIABLE = ("kl", "reverse_kl", "log_alpha")


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def turn_mask(num_depths: int = K) -> Tensor:
    return Batch(tokens=TURNS, positions=TURNS, segments=TURNS, turns=TURNS, ids=(("a",), ("b",))).depth_mask(
        num_depths
    )


def masks() -> dict[str, Tensor]:
    """That of whole turns, and what may be left of it."""
    whole = turn_mask()
    holes = whole & (normal(*whole.shape, seed=30) > 0)
    depth_missing = whole.clone()
    depth_missing[1] = False
    return {"whole": whole, "holes": holes, "depth_missing": depth_missing, "none": torch.zeros_like(whole)}


@dataclass(frozen=True)
class Case:
    """The arguments of ``token_stats``."""

    hidden: Tensor
    heads: list[LinearHead]
    target_hidden: Tensor
    target_head: LinearHead
    vocab: DraftVocab
    tokens: Tensor
    mask: Tensor

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self.hidden, self.heads, self.target_hidden, self.target_head, self.vocab, self.tokens, self.mask

    def reference(self, temperature: float | Tensor = 1.0, **options: Any) -> TokenStats:
        """``logit_stats`` of each depth's anchors; zeros where the mask is 0."""
        temperatures = torch.as_tensor(temperature, dtype=torch.float64).expand(self.tokens.shape)
        depths = []
        for depth, (mask, head) in enumerate(zip(self.mask, self.heads, strict=True)):
            rows, anchors = mask.nonzero().unbind(1)
            stats = logit_stats(
                head.logits(self.hidden[depth][mask]),
                self.target_head.logits(self.target_hidden[rows, anchors + depth + 1]),
                self.tokens[rows, anchors + depth + 2],
                self.vocab,
                temperature=temperatures[rows, anchors + depth + 1],
                **options,
            )
            depths.append(
                {name: value.new_zeros(mask.shape).masked_scatter(mask, value) for name, value in stats.items()}
            )
        return TokenStats(mask=self.mask, **{name: torch.stack([one[name] for one in depths]) for name in depths[0]})

    def fused(self, **options: Any) -> TokenStats:
        return token_stats(*self.arguments, **options)

    @property
    def summary(self) -> HeadSummary:
        return head_summary(self.target_head, self.target_hidden)

    @property
    def leaves(self) -> list[Tensor]:
        """Everything that takes a gradient, a shared tensor once."""
        tensors = [self.hidden, *(tensor for head in self.heads for tensor in (head.weight, head.bias))]
        return list({id(tensor): tensor for tensor in tensors if tensor is not None and tensor.requires_grad}.values())


def make_case(
    *,
    vocab: DraftVocab = TRUNCATED,
    heads: str = "ABC",
    shaped: bool = False,
    mask: Tensor | None = None,
    frozen: str = "",
    dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
) -> Case:
    """A case of independent normal tensors.

    Args:
        heads: a letter a depth; depths of one letter share a head.
        shaped: heads have scale, bias and soft cap.
        frozen: "heads", "hidden" or nothing.
        scale: of the draft's weights, which makes q far from or near p.
    """
    mask = turn_mask() if mask is None else mask
    num_depths, size, length = mask.shape
    by_letter = {}
    for letter in heads:
        tensors = [normal(vocab.size, H, seed=10 + ord(letter)) * scale, normal(vocab.size, seed=20 + ord(letter))]
        weight, bias = (tensor.to(dtype).requires_grad_(frozen != "heads") for tensor in tensors)
        by_letter[letter] = LinearHead(weight, bias, scale=0.8, soft_cap=4.0) if shaped else LinearHead(weight)
    target_weight, target_bias = normal(vocab.target_size, HT, seed=4, dtype=dtype), normal(vocab.target_size, seed=5)
    plain = LinearHead(target_weight)
    return Case(
        hidden=normal(num_depths, size, length, H, seed=1, dtype=dtype).requires_grad_(frozen != "hidden"),
        heads=[by_letter[letter] for letter in heads],
        target_hidden=normal(size, length, HT, seed=2, dtype=dtype),
        target_head=LinearHead(target_weight, target_bias.to(dtype), scale=0.7, soft_cap=5.0) if shaped else plain,
        vocab=vocab,
        tokens=torch.randint(0, vocab.target_size, (size, length), generator=torch.Generator().manual_seed(3)),
        mask=mask,
    )


def naive(case: Case, temperature: float | Tensor = 1.0) -> dict[str, Tensor]:
    """A loop in float64: depth k at anchor t proposes x_{t+1+k}; its target distribution is the target's row t + k."""

    def logits(head: LinearHead, hidden: Tensor) -> Tensor:
        raw = head.scale * (head.weight.double() @ hidden.double()) + (0.0 if head.bias is None else head.bias.double())
        return raw if head.soft_cap is None else head.soft_cap * (raw / head.soft_cap).tanh()

    full = {name: torch.zeros(case.mask.shape, dtype=torch.float64) for name in NAMES}
    for depth, row, anchor in case.mask.nonzero().tolist():
        z_q = logits(case.heads[depth], case.hidden[depth, row, anchor])
        z_p = logits(case.target_head, case.target_hidden[row, anchor + depth + 1])
        token = int(case.tokens[row, anchor + depth + 2])
        divisor = float(
            torch.as_tensor(temperature, dtype=torch.float64).expand(case.tokens.shape)[row, anchor + depth + 1]
        )
        for name, value in naive_stats(z_q, z_p, token, case.vocab, divisor).items():
            full[name][depth, row, anchor] = value
    return full


def as_dict(stats: TokenStats, names: tuple[str, ...] = NAMES) -> dict[str, Tensor]:
    return {name: getattr(stats, name) for name in names}


def weighted(stats: Mapping[str, Tensor], names: tuple[str, ...] = DIFFERENTIABLE) -> Tensor:
    """A loss that weighs every entry of every statistic differently."""
    return sum(
        ((stats[name] * normal(*stats[name].shape, seed=40 + i)).sum() for i, name in enumerate(names)), torch.zeros(())
    )


def gradients(case: Case, loss: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, case.leaves)


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float, what: object = "") -> None:
    """By the norm of the difference; equal zeros pass."""
    assert ours.shape == theirs.shape
    assert ours.isfinite().all(), what
    assert (ours - theirs).norm() <= tolerance * theirs.norm(), what


def assert_equals_reference(
    case: Case,
    *,
    temperature: float | Tensor = 1.0,
    chunk_size: int | None = 4,
    summary: HeadSummary | None = None,
) -> None:
    """Every statistic elementwise, and every gradient of a loss that weighs all entries differently."""
    ours = as_dict(case.fused(temperature=temperature, chunk_size=chunk_size, target_summary=summary))
    theirs = as_dict(case.reference(temperature=temperature))
    for name in NAMES:
        assert ours[name].dtype == theirs[name].dtype
        assert torch.allclose(ours[name], theirs[name], rtol=1e-5, atol=1e-5), name
        assert not ours[name][~case.mask].any(), name
        assert ours[name].requires_grad == (name in DIFFERENTIABLE), name
    for one, two in zip(gradients(case, weighted(ours)), gradients(case, weighted(theirs)), strict=True):
        assert_close(one, two, 1e-5)


def in_forward(objective: Objective, case: Case, gamma: float = 0.8) -> InForward:
    """As training states it."""
    promised = InForward.of(objective, counts(case), gamma)
    assert promised is not None
    return promised


def counts(case: Case) -> Tensor:
    """N_k of a whole step, more than this micro-batch holds."""
    return case.mask.sum((1, 2)) + 3
