from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace

import pytest
import torch

from lkspec.benchmarks.base import Benchmark, BenchmarkPrompt
from lkspec.decoding.chain import ChainDecoder, Completion, Request
from lkspec.decoding.sampling import Sampling
from lkspec.drafts.eagle3 import Eagle3
from lkspec.measure.benchmark import Answer, Measurement, Setting, gathered, measure
from lkspec.targets.tiny import TinyTarget
from lkspec.types import Round
from lkspec.vocab import DraftVocab

K = 3
GREEDY = Setting(temperature=0.0, num_draft_tokens=K)
SIZES = {
    "num_layers": 3, "aux_layer_ids": (0, 1, 2), "hidden_size": 32, "num_heads": 2, "num_kv_heads": 1, "ffn_size": 64
}  # fmt: skip


@pytest.fixture(scope="module")
def target() -> TinyTarget:
    return TinyTarget(**SIZES, device="cpu")


@pytest.fixture(scope="module")
def draft(target) -> Eagle3:
    return random_draft(target)


def random_draft(target: TinyTarget, vocab: DraftVocab | None = None) -> Eagle3:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return Eagle3(target.spec, vocab or DraftVocab.full(target.vocab_size), num_depths=K)


def benchmark_of(num_prompts: int, *, num_turns: int = 1, num_new: int, system_prompt: str | None = None) -> Benchmark:
    """``num_turns`` turns a prompt; every third prompt has only the first."""
    rows = [
        BenchmarkPrompt(
            id=f"q{i}",
            turns=tuple(f"Question {i}, part {turn}?" for turn in range(num_turns if i % 3 != 2 else 1)),
            category=None,
            group=f"g{i}",
        )
        for i in range(num_prompts)
    ]
    return Benchmark(
        rows, name="made_up", num_prompts=None, template="{prompt}", system_prompt=system_prompt, max_new_tokens=num_new
    )


def key(answer: Answer) -> tuple[str, int]:
    return answer.prompt.id, answer.completion.request.turn


def inner_rounds(answer: Answer) -> list[Round]:
    """Rounds whose K proposals lie inside the text."""
    return [decoded for decoded in answer.completion.rounds if not decoded.past_end]


@pytest.fixture(scope="module")
def greedy(target) -> Measurement:
    """A random draft over the six most frequent tokens of the target's own greedy text: it is right now and then."""
    benchmark = benchmark_of(5, num_turns=2, num_new=36, system_prompt="Be kind.")
    texts = measure(target, random_draft(target), benchmark, replace(GREEDY, num_draft_tokens=1), batch_size=8)
    written = torch.tensor([token for answer in texts.answers for token in answer.completion.tokens])
    vocab = DraftVocab.from_counts(torch.bincount(written, minlength=target.vocab_size), 6)
    found = measure(target, random_draft(target, vocab), benchmark, GREEDY, batch_size=3)
    # Lossless: another draft, K and batch size leave the text alone.
    assert [a.completion.tokens for a in found.answers] == [a.completion.tokens for a in texts.answers]
    return found


def test_second_turns_follow_the_models_own_first_answer(target, greedy):
    answers = {key(answer): answer.completion for answer in greedy.answers}
    assert list(answers) == [(f"q{i}", turn) for i in range(5) for turn in range(2) if (i, turn) != (2, 1)]
    for (name, turn), completion in answers.items():
        expected = "<|im_start|>system\nBe kind.<|im_end|>\n"
        for earlier in range(turn + 1):
            expected += f"<|im_start|>user\nQuestion {name[1:]}, part {earlier}?<|im_end|>\n<|im_start|>assistant\n"
            if earlier < turn:
                first = answers[name, earlier]
                said = first.tokens[:-1] if first.tokens[-1] in target.eos_ids else first.tokens
                expected += target.tokenizer.decode(said) + "<|im_end|>\n"
        assert completion.request.tokens == tuple(target.tokenizer(expected)["input_ids"])
        assert completion.request.max_new_tokens == 36


def test_an_end_token_does_not_enter_the_next_prompt(target, draft):
    benchmark = benchmark_of(2, num_turns=2, num_new=8)
    plain = measure(target, draft, benchmark, GREEDY, batch_size=2)
    third = plain.answers[0].completion.tokens[2]
    first_at = plain.answers[0].completion.tokens.index(third)
    ending = TinyTarget(**SIZES, device="cpu")
    ending.eos_ids = (third,)
    first, second = measure(ending, draft, benchmark, GREEDY, batch_size=2).answers[:2]
    assert first.completion.tokens == plain.answers[0].completion.tokens[: first_at + 1]
    assert first.completion.finish_reason == "stop"
    said = target.tokenizer.decode(first.completion.tokens[:-1])
    asked = target.tokenizer.decode(second.completion.request.tokens)
    assert f"<|im_start|>assistant\n{said}<|im_end|>\n<|im_start|>user\nQuestion 0, part 1?" in asked


def test_at_temperature_0_the_walk_is_the_decoding(greedy):
    accepted = 0
    for answer in greedy.answers:
        rounds, walk = inner_rounds(answer), answer.walks[-1]
        assert len(answer.walks) == K
        if walk is None:
            assert rounds == []
            continue
        assert walk.rounds == len(rounds)
        assert walk.accepted == sum(decoded.accepted for decoded in rounds)
        for depth in range(1, K + 1):
            assert walk.accepted_at_least[depth - 1] == sum(decoded.accepted >= depth for decoded in rounds)
        accepted += sum(decoded.accepted for decoded in rounds)
    every = [decoded for answer in greedy.answers for decoded in inner_rounds(answer)]
    assert greedy.walk_acceptance_lengths()[-1] == 1 + accepted / len(every)
    assert {decoded.accepted for decoded in every} >= {0, 1, K}  # otherwise little was compared
    assert any(decoded.past_end for answer in greedy.answers for decoded in answer.completion.rounds)


def test_at_temperature_1_the_walk_is_decodings_expectation():
    flat = TinyTarget(**SIZES, logit_std=1.0, device="cpu")  # a random draft is right about half of the time
    setting = Setting(temperature=1.0, num_draft_tokens=K, seed=3)
    # Many answers: with n of them a systematic error cannot exceed sqrt(n) of its own standard errors.
    found = measure(flat, random_draft(flat), benchmark_of(60, num_new=30), setting, batch_size=20)
    # Per answer: (accepted, rounds) measured and expected by the walk.
    sums = [
        (
            sum(decoded.accepted for decoded in inner_rounds(answer)),
            len(inner_rounds(answer)),
            walk.accepted,
            walk.rounds,
        )
        for answer in found.answers
        if (walk := answer.walks[-1]) is not None
    ]
    accepted, rounds, walk_accepted, walk_rounds = (sum(column) for column in zip(*sums, strict=True))
    assert rounds > 400
    assert 0.4 < accepted / rounds < 2
    difference = (1 + accepted / rounds) - found.walk_acceptance_lengths()[-1]
    # Linearised error of the ratio; given the texts, answers are independent and the walk is the mean.
    rate = walk_accepted / walk_rounds
    errors = [(a - rate * r) - (wa - rate * wr) for a, r, wa, wr in sums]
    standard_error = math.sqrt(sum(error**2 for error in errors)) / rounds
    assert 0 < standard_error < 0.06
    assert abs(difference) < 4 * standard_error


def test_filtered_sampling_has_no_walk(target, draft):
    setting = Setting(temperature=1.0, num_draft_tokens=2, top_k=5)
    found = measure(target, draft, benchmark_of(2, num_new=6), setting, batch_size=2)
    assert [answer.walks for answer in found.answers] == [(), ()]
    assert all(math.isnan(tau) for tau in found.walk_acceptance_lengths())


def test_only_batch_size_1_has_a_speedup(target, draft):
    benchmark = benchmark_of(3, num_turns=2, num_new=5)
    single = measure(target, draft, benchmark, GREEDY, batch_size=1)
    assert single.baseline_tokens == single.num_tokens == 5 * 5  # greedy and lossless: both write the same text
    assert single.baseline_seconds > 0
    assert single.speedup == pytest.approx(single.baseline_seconds / single.seconds)
    assert single.tokens_per_second == pytest.approx(25 / single.seconds)
    together = measure(target, draft, benchmark, GREEDY, batch_size=2)
    assert (together.speedup, together.baseline_seconds, together.baseline_tokens) == (None, None, 0)
    assert [a.completion for a in together.answers] == [a.completion for a in single.answers]


def test_a_subset_of_prompts_has_a_protocol_of_its_own(target, draft):
    benchmark = benchmark_of(7, num_new=3)
    found = measure(target, draft, benchmark, GREEDY, batch_size=4, num_prompts=3)
    assert [answer.prompt.id for answer in found.answers] == ["q0", "q2", "q4"]  # i * 7 // 3
    assert found.protocol == benchmark.protocol(3) != benchmark.protocol()
    assert (found.protocol["num_prompts"], found.protocol["name"], found.benchmark) == (3, "made_up", "made_up")
    assert found.setting is GREEDY


def test_ranks_share_the_prompts(target, draft):
    benchmark = benchmark_of(7, num_turns=2, num_new=4)
    setting = Setting(temperature=1.0, num_draft_tokens=2, seed=5)
    whole = measure(target, draft, benchmark, setting, batch_size=4, num_prompts=5)
    shares = [
        measure(target, draft, benchmark, setting, batch_size=4, num_prompts=5, rank=rank, num_replicas=3)
        for rank in range(3)
    ]
    prompts = [{answer.prompt.id for answer in share.answers} for share in shares]
    assert [len(names) for names in prompts] == [2, 2, 1]
    parts = {key(answer): answer.completion for share in shares for answer in share.answers}
    assert sum(len(share.answers) for share in shares) == len(parts)  # no prompt twice
    assert parts == {key(answer): answer.completion for answer in whole.answers}  # the same texts on any rank
    assert all(share.protocol == whole.protocol for share in shares)


def test_a_rank_without_prompts_measures_nothing(target, draft):
    found = measure(target, draft, benchmark_of(1, num_new=3), GREEDY, batch_size=1, rank=1, num_replicas=2)
    assert (found.answers, found.num_tokens, found.prompt_rounds()) == ((), 0, [])
    assert all(math.isnan(tau) for tau in found.walk_acceptance_lengths())


def test_progress_counts_turns(target, draft):
    calls: list[tuple[int, int]] = []
    measure(
        target, draft, benchmark_of(3, num_turns=2, num_new=2), GREEDY, batch_size=2,
        progress=lambda done, total: calls.append((done, total)),
    )  # fmt: skip
    assert calls == [(done, 5) for done in range(1, 6)]


def test_prompt_rounds_keep_the_group(greedy):
    listed = greedy.prompt_rounds()
    assert [(r.prompt_id, r.group) for r in listed] == [(f"q{i}", f"g{i}") for i in (0, 0, 1, 1, 2, 3, 3, 4, 4)]
    assert [r.rounds for r in listed] == [answer.completion.rounds for answer in greedy.answers]
    assert sum(r.num_tokens for r in listed) == greedy.num_tokens


def test_without_ranks_gathering_changes_nothing(greedy):
    assert gathered(greedy) is greedy


class OtherEngine:
    """Decodes as lkspec does, but says of rounds only how many tokens they accepted."""

    name = "other"
    protocol = {"engine_version": "other 1"}  # noqa: RUF012 - never changed

    def __init__(self, target: TinyTarget, draft: Eagle3, *, serves_alone: bool = False) -> None:
        self.target, self.draft, self.serves_alone = target, draft, serves_alone

    def decoder(self, sampling: Sampling, *, num_draft_tokens: int, seed: int) -> OtherEngine:
        draft = self.draft if num_draft_tokens else None
        self.chain = ChainDecoder(
            self.target, draft, sampling=sampling, num_draft_tokens=num_draft_tokens, batch_size=1, seed=seed
        )
        return self

    def run(self, requests: Iterable[Request]) -> Iterator[Completion]:
        for completion in self.chain.run(requests):
            rounds = tuple(Round(-1, decoded.accepted, False) for decoded in completion.rounds)
            yield replace(completion, rounds=rounds, writers=())


def test_an_engine_decodes_in_place_of_lkspec(target, draft):
    benchmark = benchmark_of(3, num_turns=2, num_new=12)
    ours = measure(target, draft, benchmark, GREEDY, batch_size=4)
    theirs = measure(target, draft, benchmark, GREEDY, batch_size=4, engine=OtherEngine(target, draft))
    assert (ours.engine, theirs.engine) == ("lkspec", "other")
    assert [a.completion.tokens for a in theirs.answers] == [a.completion.tokens for a in ours.answers]
    accepted = [[[d.accepted for d in a.completion.rounds] for a in m.answers] for m in (ours, theirs)]
    assert accepted[0] == accepted[1]
    assert theirs.walk_acceptance_lengths() == ours.walk_acceptance_lengths()
    assert theirs.protocol == {**ours.protocol, "engine_version": "other 1"}


@pytest.mark.parametrize("serves_alone", [True, False])
def test_an_engine_that_cannot_leave_its_draft_out_has_no_speedup(target, draft, serves_alone):
    engine = OtherEngine(target, draft, serves_alone=serves_alone)
    found = measure(target, draft, benchmark_of(1, num_new=8), GREEDY, batch_size=1, engine=engine)
    assert (found.speedup is not None) == serves_alone


def test_an_engine_whose_text_is_not_the_targets_is_refused(target, draft):
    sampled = replace(GREEDY, temperature=1.0)
    engine = OtherEngine(target, draft)
    engine.decoder = lambda sampling, **options: OtherEngine.decoder(engine, Sampling(0.0), **options)
    with pytest.raises(ValueError, match=r"engine=other: \d+ tokens written at T=1 are not the target's own"):
        measure(target, draft, benchmark_of(6, num_new=48), sampled, batch_size=4, engine=engine)
