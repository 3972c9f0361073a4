"""Can the acceptance that a serving engine counts be believed? Its text against the target, its tau against the walk.

At T > 0, tokens x_t drawn from p_t have ``E[-log p_t(x_t)] = H(p_t)`` whatever came before, so the sum of the
differences is a martingale whose variance is the sum of ``Var[log p_t]``. A lost temperature, a filter or penalty that
nobody asked for, or another model moves the sum far out of it. At T = 0 every token is the argmax.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lkspec.measure.walk import as_batch
from lkspec.runs.rows import ResultRow
from lkspec.targets.base import Target

_ROWS = 64  # of logits at once
_MAX_EXCESS = 0.1  # nats a token: more than another precision explains,
_MAX_SIGMAS = 6.0  # and more than chance does
_TAU_SHARE = 0.05  # of tau: the walk counts only whole rounds, which alone moves it by some percent


@dataclass(frozen=True)
class TextEvidence:
    """How far texts are from samples of the target.

    Attributes:
        num_tokens: looked at.
        surprise: mean of -log p(x), in nats.
        expected: the same of the target's own text at this temperature.
        sigmas: their difference in standard deviations; infinite at temperature 0, where chance makes none.
    """

    num_tokens: int
    surprise: float
    expected: float
    sigmas: float

    @property
    def is_of_the_target(self) -> bool:
        """Whether the difference may be chance, or another precision's."""
        return abs(self.surprise - self.expected) <= _MAX_EXCESS or abs(self.sigmas) <= _MAX_SIGMAS


@torch.inference_mode()
def text_evidence(
    target: Target, texts: Sequence[tuple[Sequence[int], Sequence[int]]], *, temperature: float
) -> TextEvidence:
    """The evidence of (prompt, answer) pairs, sampled without filters.

    At temperature 0 surprise is ``max log p - log p(x)`` at temperature 1, of which 0 is expected.
    """
    sums = torch.zeros(3, dtype=torch.float64)  # surprise, its expectation, its variance
    num_tokens = 0
    for prompt, answer in texts:
        batch = as_batch([("text", prompt, answer)]).to(target.device)
        rows = target.states(batch).last[0, len(prompt) - 1 : -1]
        for start in range(0, len(rows), _ROWS):
            logits = target.head.logits(rows[start : start + _ROWS]).double()
            sums += _moments(logits, batch.tokens[0, len(prompt) + start :][: len(logits)], temperature).cpu()
        num_tokens += len(answer)
    surprise, expected, variance = sums.tolist()
    sigmas = (surprise - expected) / variance**0.5 if variance > 0 else float("inf")
    return TextEvidence(num_tokens, surprise / num_tokens, expected / num_tokens, sigmas)


def _moments(logits: Float[Tensor, "T V"], tokens: Tensor, temperature: float) -> Float[Tensor, " 3"]:
    """Sums of -log p(x), of its expectation and of its variance."""
    logp = (logits / (temperature or 1.0)).log_softmax(-1)
    surprise = -logp.gather(-1, tokens[:, None])[:, 0]
    if temperature == 0:
        nothing = torch.zeros((), dtype=logp.dtype, device=logp.device)
        return torch.stack([(surprise + logp.amax(-1)).sum(), nothing, nothing])
    p = logp.exp()
    finite = logp.masked_fill(p == 0, 0.0)  # 0 log 0 = 0
    entropy = -(p * finite).sum(-1)
    variance = (p * finite.square()).sum(-1) - entropy.square()
    return torch.stack([surprise.sum(), entropy.sum(), variance.clamp(min=0.0).sum()])


def check_text(
    target: Target, texts: Sequence[tuple[Sequence[int], Sequence[int]]], *, temperature: float, engine: str
) -> None:
    """Refuses (prompt, answer) pairs that are not the target's own at this temperature.

    Raises:
        ValueError: they are not.
    """
    evidence = text_evidence(target, texts, temperature=temperature)
    if not evidence.is_of_the_target:
        raise ValueError(
            f"engine={engine}: {evidence.num_tokens} tokens written at T={temperature:g} are not the target's own: "
            f"{evidence.surprise:.2f} nats of surprise a token, its own have {evidence.expected:.2f} "
            f"({evidence.sigmas:.0f} standard deviations apart), so their acceptance says nothing. The engine applies "
            "a filter or penalty, serves other weights, or samples wrongly: CPU builds of vLLM 0.32 lose the "
            "temperature when they draft (vLLM issue 55005), which engine=vllm repairs in its own process and no "
            "request to a server can"
        )


def doubts(rows: Sequence[ResultRow]) -> list[str]:
    """A line for each measurement whose tau is far from the walk of the run's own draft along the same text."""
    return [
        f"{row.benchmark} T={row.temperature:g}: tau {row.tau:.3f}, but this run's draft would have had "
        f"{row.walk_tau:.3f} along the same text: the engine drafts with another, or (at T > 0) by argmax instead of "
        "from q (vLLM: draft_sample_method, SGLang: --speculative-use-rejection-sampling; Medusa always does)"
        for row in rows
        if row.walk_tau is not None and abs(row.tau - row.walk_tau) > max(row.high - row.low, _TAU_SHARE * row.tau)
    ]
