"""The acceptance that vLLM measures of an exported draft is the one that lkspec measures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from served_tiny import Tiny, tiny_in, trained, truncated

from lkspec.decoding.chain import ChainDecoder, Completion, Request
from lkspec.decoding.sampling import Sampling
from lkspec.drafts.base import Draft
from lkspec.drafts.eagle3 import Eagle3
from lkspec.drafts.medusa import Medusa
from lkspec.engines.vllm_engine import VllmEngine
from lkspec.export.base import WriteOptions
from lkspec.export.writing import layout_for, write_export
from lkspec.measure.metrics import PromptRounds, acceptance_metrics, group_counts, paired_difference_interval

pytestmark = [pytest.mark.serve, pytest.mark.slow]

GREEDY, SAMPLED = Sampling(temperature=0.0), Sampling(temperature=1.0)
NUM_SAMPLES = 3  # texts a prompt at T = 1
SMALLER_VOCAB = 160


@dataclass(frozen=True)
class Case:
    """One export at one K: one start of vLLM."""

    format: str
    vocab: str
    num_draft_tokens: int

    def __str__(self) -> str:
        return f"{self.format}-{self.vocab}-K{self.num_draft_tokens}"


# Every pair of values of the three occurs. The speculators layout names the auxiliary layers, so its target has others
# than the default, which its four layers do not allow.
CASES = [
    Case("vllm", "full", 3),
    Case("vllm", "truncated", 7),
    Case("speculators", "truncated", 3),
    Case("speculators", "full", 7),
]


@pytest.fixture(scope="module")
def eight_layers(serve_python: str, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny_in(tmp_path_factory.mktemp("served") / "target", num_layers=8)


@pytest.fixture(scope="module")
def four_layers(serve_python: str, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny_in(tmp_path_factory.mktemp("served") / "target", num_layers=4, aux_layer_ids=(1, 2, 3))


@pytest.fixture(scope="module")
def tinies(eight_layers: Tiny, four_layers: Tiny) -> dict[str, tuple[Tiny, Draft]]:
    """Of each layout."""
    found = {"vllm": eight_layers, "speculators": four_layers}
    return {name: (tiny, trained(Eagle3, tiny, num_depths=4)) for name, tiny in found.items()}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_eagle3(case: Case, tinies: dict[str, tuple[Tiny, Draft]], serve_python: str, tmp_path: Path) -> None:
    tiny, draft = tinies[case.format]
    if case.vocab == "truncated":
        draft = truncated(draft, tiny, SMALLER_VOCAB)
    words = {"method": "eagle3", "draft_sample_method": "probabilistic"}
    with served(tiny, draft, case.format, words, case.num_draft_tokens, serve_python, tmp_path) as engine:
        assert_equal_greedily(tiny, draft, engine, case.num_draft_tokens)
        assert_sampled_alike(tiny, draft, engine, case.num_draft_tokens)


def test_medusa(eight_layers: Tiny, serve_python: str, tmp_path: Path) -> None:
    """A truncated one. At T = 0 only: vLLM's Medusa drafts by argmax at every temperature."""
    draft = truncated(trained(Medusa, eight_layers, num_depths=3), eight_layers, SMALLER_VOCAB)
    with served(eight_layers, draft, "medusa", {"method": "medusa"}, 3, serve_python, tmp_path) as engine:
        assert_equal_greedily(eight_layers, draft, engine, 3)


@contextmanager
def served(
    tiny: Tiny, draft: Draft, layout: str, words: dict[str, str], num_draft_tokens: int, python: str, folder: Path
) -> Iterator[VllmEngine]:
    """vLLM with the exported draft."""
    out = folder / "draft"
    options = WriteOptions(num_draft_tokens=num_draft_tokens)
    write_export(draft, tiny.target, out, layout=layout_for(layout, draft), options=options)
    engine = VllmEngine(python=python, max_model_len=512, log=str(folder / "vllm.log"))
    assert tiny.target.source is not None
    engine.serve(tiny.target.source, {**words, "model": str(out)}, tiny.target.eos_ids)
    try:
        yield engine
    finally:
        engine.close()


def assert_equal_greedily(tiny: Tiny, draft: Draft, engine: VllmEngine, num_draft_tokens: int) -> None:
    """Prompt by prompt the same tokens, and as many rounds with 0, 1, .. K accepted ones."""
    ours, theirs = both_sides(tiny.requests, tiny, draft, engine, GREEDY, num_draft_tokens)
    for ours_of, theirs_of in zip(ours, theirs, strict=True):
        assert theirs_of.tokens == ours_of.tokens, theirs_of.request.prompt_id
        assert accepted(theirs_of) == accepted(ours_of), theirs_of.request.prompt_id
    shares = acceptance_metrics(rounds(ours), num_draft_tokens=num_draft_tokens).acceptance_per_position
    assert 0.1 < shares[0] < 0.9, f"accepted per position {shares}: this draft would hide mistakes"
    assert shares[num_draft_tokens - 1] > 0, shares


def assert_sampled_alike(tiny: Tiny, draft: Draft, engine: VllmEngine, num_draft_tokens: int) -> None:
    """The 99 % interval of the difference in tau holds 0, and is narrow."""
    requests = [
        replace(request, prompt_id=f"{request.prompt_id}/{sample}")
        for request in tiny.requests
        for sample in range(NUM_SAMPLES)
    ]
    ours, theirs = both_sides(requests, tiny, draft, engine, SAMPLED, num_draft_tokens)
    difference, low, high = paired_difference_interval(group_counts(rounds(theirs)), group_counts(rounds(ours)))
    taus = [acceptance_metrics(rounds(side), num_draft_tokens=num_draft_tokens).tau for side in (ours, theirs)]
    numbers = (
        f"tau {taus[0]:.3f} here, {taus[1]:.3f} in vLLM, difference {difference:+.3f}, 99 % {low:+.3f} .. {high:+.3f}, "
        f"{len(requests)} texts of up to {requests[0].max_new_tokens} tokens"
    )
    print(numbers)
    assert low <= 0.0 <= high, numbers
    assert (high - low) / 2 < 0.15, numbers


def both_sides(
    requests: Sequence[Request],
    tiny: Tiny,
    draft: Draft,
    engine: VllmEngine,
    sampling: Sampling,
    num_draft_tokens: int,
) -> tuple[list[Completion], list[Completion]]:
    """Answers of lkspec and of vLLM in the order of the requests."""
    theirs = list(engine.decoder(sampling, num_draft_tokens=num_draft_tokens, seed=0).run(requests))
    chain = ChainDecoder(
        tiny.target, draft, sampling=sampling, num_draft_tokens=num_draft_tokens, batch_size=len(tiny.requests)
    )
    ours = {completion.request.prompt_id: completion for completion in chain.run(requests)}
    return [ours[request.prompt_id] for request in requests], theirs


def accepted(completion: Completion) -> list[int]:
    return sorted(round.accepted for round in completion.rounds)


def rounds(completions: Sequence[Completion]) -> list[PromptRounds]:
    return [PromptRounds(c.request.prompt_id, c.request.prompt_id, c.rounds, len(c.tokens)) for c in completions]
