"""What the loss benchmarks compare: the package's walk, an eager loss on logits, and the products that neither avoids.

Every loss goes from hidden states to a number; ``both_passes`` adds gradients of hidden states and of the head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lkspec.losses.fused.in_forward import InForward
from lkspec.losses.fused.token_stats import token_stats
from lkspec.losses.objectives import Objective, depth_weights, reduce_loss
from lkspec.types import LinearHead
from lkspec.vocab import DraftVocab

ETA = 3.0


@dataclass(frozen=True)
class Case:
    """K depths of a draft over S anchors of one row of text; the head is shared."""

    hidden: Tensor
    weight: Tensor
    target_hidden: Tensor
    target_weight: Tensor
    vocab: DraftVocab
    tokens: Tensor
    mask: Tensor

    @property
    def num_depths(self) -> int:
        return len(self.mask)

    def forget_gradients(self) -> None:
        self.hidden.grad = self.weight.grad = None


def make_case(num_rows: int, hidden_size: int, num_target: int, num_draft: int, num_depths: int = 1) -> Case:
    """Random states whose logits have unit variance for the draft and four times that for the target."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    num_slots = num_rows + num_depths + 1
    mask = torch.zeros(num_depths, 1, num_slots, dtype=torch.bool)
    mask[:, :, :num_rows] = True
    target_weight = 2 * hidden_size**-0.5 * draw(num_target, hidden_size)
    return Case(
        hidden=draw(num_depths, 1, num_slots, hidden_size).requires_grad_(),
        weight=(hidden_size**-0.5 * draw(num_draft, hidden_size)).requires_grad_(),
        target_hidden=draw(1, num_slots, hidden_size),
        target_weight=target_weight,
        vocab=DraftVocab(torch.arange(num_draft) * (num_target // num_draft), num_target),
        tokens=torch.randint(num_target, (1, num_slots), generator=generator),
        mask=mask,
    )


def fused(case: Case, objective: Objective, *, in_forward: bool) -> Callable[[], Tensor]:
    """The package, as training calls it."""
    counts = case.mask.sum((1, 2))
    promised = InForward.of(objective, counts) if in_forward else None
    heads, target_head = [LinearHead(case.weight)] * case.num_depths, LinearHead(case.target_weight)

    def run() -> Tensor:
        stats = token_stats(
            case.hidden, heads, case.target_hidden, target_head, case.vocab, case.tokens, case.mask,
            in_forward=promised, row_value=objective.row_value,
        )  # fmt: skip
        values = stats.value
        if values is None:
            mean_alpha = (stats.log_alpha.detach().exp() * case.mask).sum((1, 2)) / counts
            values = objective.values(stats, mean_alpha)
        return reduce_loss(values, case.mask, counts)

    return run


def eager_lk_lambda(case: Case) -> Callable[[], Tensor]:
    """Adaptive LK-lambda as one would write it: logits, log_softmax, the minimum in the log domain, autograd.

    It computes the loss alone (no statistics), the target's logits once, and drops unsupervised rows first.
    """
    num_rows = int(case.mask[0].sum())

    def run() -> Tensor:
        with torch.no_grad():
            wide = (case.target_hidden[0, 1 : num_rows + case.num_depths] @ case.target_weight.T).log_softmax(-1)
            logp_rows = case.vocab.restrict(wide)
            del wide
        loss = torch.zeros(())
        for depth, gamma in enumerate(depth_weights(case.num_depths).tolist()):
            logp = logp_rows[depth : depth + num_rows]
            logq = (case.hidden[depth, 0, :num_rows] @ case.weight.T).log_softmax(-1)
            log_renormed = logp - logp.logsumexp(-1, keepdim=True)
            kl = (log_renormed.exp() * (log_renormed - logq)).sum(-1)
            alpha = torch.minimum(logp, logq).logsumexp(-1).exp()
            mix = torch.exp(-ETA * alpha.detach().mean())
            loss = loss + gamma * (mix * kl + (1 - mix) * (1 - alpha)).mean()
        return loss

    return run


def four_products(case: Case) -> Callable[[], None]:
    """The floor: target logits, draft logits, d hidden and d head, each into memory that is there already."""
    rows = int(case.mask[0].sum())
    hidden, weight = case.hidden.detach()[0, 0, :rows].contiguous(), case.weight.detach()
    target = case.target_hidden[0, 1 : rows + 1]
    target_logits, logits = torch.empty(rows, len(case.target_weight)), torch.empty(rows, len(weight))
    d_hidden, d_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def run() -> None:
        torch.mm(target, case.target_weight.T, out=target_logits)
        for _ in range(case.num_depths):
            torch.mm(hidden, weight.T, out=logits)
            torch.mm(logits, weight, out=d_hidden)
            torch.mm(logits.T, hidden, out=d_weight)

    return run


def both_passes(case: Case, loss: Callable[[], Tensor]) -> Callable[[], None]:
    """Forward and backward, as in a step that starts without gradients."""

    def run() -> None:
        case.forget_gradients()
        loss().backward()

    return run
