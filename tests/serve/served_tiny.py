"""Tiny targets that vLLM can serve, their own texts, and drafts that have learnt a little of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lkspec.benchmarks.mini import SUITES, Mini
from lkspec.decoding.chain import ChainDecoder, Request
from lkspec.decoding.sampling import Sampling
from lkspec.drafts.base import Draft
from lkspec.targets.tiny import TinyTarget
from lkspec.targets.transformers import TransformersTarget
from lkspec.types import Batch, TargetStates, stack_rows
from lkspec.vocab import DraftVocab

_WIDE_HEADS: dict[str, Any] = {"num_heads": 2, "num_kv_heads": 1}  # of 32: vLLM's attention on CPUs takes no smaller
_QUESTION_LENGTH = 60
_NUM_STEPS, _ROWS_A_STEP, _LEARNING_RATE = 150, 8, 3e-3


@dataclass(frozen=True)
class Tiny:
    """A target in a folder, prompts, and its own answers to them with its states.

    Attributes:
        requests: first turns of the packaged suites, cut short.
        batch: the requests with a greedy and a sampled answer each.
    """

    target: TransformersTarget
    requests: list[Request]
    batch: Batch
    states: TargetStates


def tiny_in(folder: Path, *, num_layers: int, aux_layer_ids: tuple[int, ...] | None = None) -> Tiny:
    """Saves a tiny target, loads it from there as anybody's, and lets it answer."""
    made = TinyTarget(num_layers=num_layers, aux_layer_ids=aux_layer_ids, device="cpu", **_WIDE_HEADS)
    made.save(folder)
    target = TransformersTarget(str(folder), aux_layer_ids=aux_layer_ids, device="cpu")
    requests = _requests(target, num_prompts=24, max_new_tokens=48)
    batch = _answered(target, requests)
    return Tiny(target, requests, batch, target.states(batch))


def _requests(target: TransformersTarget, *, num_prompts: int, max_new_tokens: int) -> list[Request]:
    requests = []
    for suite in SUITES:
        for prompt in Mini(suite=suite, num_prompts=num_prompts // len(SUITES)).prompts():
            messages = [{"role": "user", "content": prompt.turns[0][:_QUESTION_LENGTH]}]
            requests.append(Request(f"{suite}/{prompt.id}", 0, target.prompt_ids(messages), max_new_tokens))
    return requests


def _answered(target: TransformersTarget, requests: list[Request]) -> Batch:
    """One conversation a row: every request with its greedy answer, then every request with a sampled one."""
    texts = []
    for temperature in (0.0, 1.0):
        alone = ChainDecoder(
            target, None, sampling=Sampling(temperature), num_draft_tokens=0, batch_size=len(requests), seed=1
        )
        texts += [(c.request.tokens, c.tokens) for c in alone.run(requests)]
    lengths = [len(prompt) + len(answer) for prompt, answer in texts]
    return Batch(
        tokens=stack_rows(torch.tensor([*prompt, *answer]) for prompt, answer in texts),
        positions=stack_rows(torch.arange(length) for length in lengths),
        segments=stack_rows(torch.ones(length, dtype=torch.int64) for length in lengths),
        turns=stack_rows(torch.tensor([0] * len(prompt) + [1] * len(answer)) for prompt, answer in texts),
        ids=tuple((str(row),) for row in range(len(texts))),
    )


def trained(architecture: type[Draft], tiny: Tiny, *, num_depths: int) -> Draft:
    """A draft that has seen the answers: it is right and wrong often enough for both to show.

    Minimises the cross-entropy with the target's distribution, the same weight for every depth.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vocab = DraftVocab.full(tiny.target.vocab_size)
        draft = architecture(tiny.target.spec, vocab, num_depths=num_depths)  # type: ignore[call-arg]
    optimizer = torch.optim.Adam(draft.parameters(), lr=_LEARNING_RATE)
    probs = tiny.target.head.logits(tiny.states.last).softmax(-1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(_NUM_STEPS):
        rows = torch.randperm(len(probs), generator=generator)[:_ROWS_A_STEP]
        states = TargetStates(aux=tiny.states.aux[rows], last=tiny.states.last[rows])
        loss = _cross_entropy(draft, _rows(tiny.batch, rows), states, probs[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return draft.eval()


def _cross_entropy(draft: Draft, batch: Batch, states: TargetStates, probs: Tensor) -> Tensor:
    hidden = draft.unroll(batch, states)
    masks = batch.depth_mask(draft.num_depths)
    losses = []
    for depth in range(1, draft.num_depths + 1):
        logprobs = draft.head(depth).logits(hidden[depth - 1]).log_softmax(-1)
        wanted = probs.roll(-depth, dims=1)  # row t + k serves anchor t; the mask leaves out what went round
        losses.append(-(wanted * logprobs).sum(-1)[masks[depth - 1]].mean())
    return torch.stack(losses).mean()


def _rows(batch: Batch, rows: Tensor) -> Batch:
    return Batch(
        batch.tokens[rows],
        batch.positions[rows],
        batch.segments[rows],
        batch.turns[rows],
        tuple(batch.ids[row] for row in rows.tolist()),
    )


def truncated(draft: Draft, tiny: Tiny, size: int) -> Draft:
    """The same draft with the heads' rows of the answers' most frequent tokens only."""
    counts = torch.bincount(tiny.batch.tokens[tiny.batch.turns > 0], minlength=tiny.target.vocab_size)
    vocab = DraftVocab.from_counts(counts, size, keep=tiny.target.special_ids)
    smaller = type(draft)(tiny.target.spec, vocab, num_depths=draft.num_depths)  # type: ignore[call-arg]
    state = {name: tensor[vocab.ids] if "lm_head" in name else tensor for name, tensor in draft.state_dict().items()}
    smaller.load_state_dict({**state, "vocab.ids": vocab.ids})
    return smaller.eval()
