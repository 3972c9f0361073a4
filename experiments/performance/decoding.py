"""Decoding against transformers' own generation, greedy, on one target in one run: batch 1 and batch 16.

python experiments/performance/decoding.py --run RUN     a trained run: its target and its draft
python experiments/performance/decoding.py --tiny        a random target and draft, to see that everything runs

Every contestant answers the same prompts with the same model object (weights, dtype, sdpa attention), and all must
write the target's own greedy text before anything is timed. transformers cannot take a draft head as an assistant
model, and drafts for one row at a time only; its prompt lookup, which drafts what followed the same two tokens
earlier in the text, needs no model and is what can be compared with.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from measuring import print_table, write_csv

from lkspec.app.load import load_run
from lkspec.benchmarks.mini import SUITES, Mini
from lkspec.decoding.chain import ChainDecoder, Request
from lkspec.decoding.sampling import Sampling
from lkspec.drafts.base import Draft
from lkspec.drafts.eagle3 import Eagle3
from lkspec.runs.find import find_run, list_runs
from lkspec.targets.tiny import TinyTarget
from lkspec.targets.transformers import TransformersTarget
from lkspec.vocab import DraftVocab

NUM_DRAFT_TOKENS = 3
BATCH_SIZE, NUM_SINGLE = 16, 4  # prompts decoded together, and how many of them one by one
NEAR_TIE = 1e-4  # two best logits closer than this may swap under another order of summation
GREEDY = Sampling(temperature=0.0)

Texts = list[tuple[int, ...]]


@dataclass
class Contestant:
    """One way to answer the prompts, and how long it took each time."""

    name: str
    batch_size: int
    answer: Callable[[Sequence[Request]], Texts]
    num_tokens: int = 0
    num_forwards: int = 0
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)

    def prompts(self, requests: Sequence[Request]) -> Sequence[Request]:
        return requests if self.batch_size > 1 else requests[:NUM_SINGLE]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="latest", help="a trained run: latest, the beginning of its name, or a path")
    parser.add_argument("--run-root", type=Path, default=Path("runs"))
    parser.add_argument("--tiny", action="store_true", help="a random target and draft instead of a run")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.run == "latest" and not options.tiny and not list_runs(options.run_root):
        print(f"\ndecoding: skipped, there is no trained run under {options.run_root}: `make quickstart` trains one")
        return
    target, draft = tiny_pair() if options.tiny else loaded(options.run, options.run_root)
    requests = make_requests(target, options.new_tokens)
    contestants = make_contestants(target, draft)
    check_texts(target, contestants, requests)
    for repeat in range(options.repeats):
        for contestant in contestants:
            measure(contestant, requests)
            speed = contestant.num_tokens / contestant.seconds[-1]
            print(
                f"{repeat + 1}/{options.repeats} {contestant.name}, batch {contestant.batch_size}: {speed:.1f} tokens/s"
            )
    rows = [row(contestant, contestants) for contestant in contestants]
    lengths = [len(request.tokens) for request in requests]
    print_table(
        f"greedy decoding of {target.name} ({target.dtype}, {target.attn_implementation}), {options.threads} threads, "
        f"prompts of {min(lengths)} to {max(lengths)} tokens, {options.new_tokens} new ones",
        rows,
    )
    write_csv(options.out, rows)


def tiny_pair() -> tuple[TransformersTarget, Draft]:
    target = TinyTarget(device="cpu")
    torch.manual_seed(0)
    return target, Eagle3(target.spec, DraftVocab.full(target.vocab_size), num_depths=NUM_DRAFT_TOKENS).eval()


def loaded(run: str, root: Path) -> tuple[TransformersTarget, Draft]:
    trained = load_run(find_run(run, root), device="cpu")
    assert isinstance(trained.target, TransformersTarget)
    return trained.target, trained.draft


def make_requests(target: TransformersTarget, new_tokens: int) -> list[Request]:
    """Prompts of the packaged suites in turns, so that the first few are of all kinds."""
    num_each = -(-BATCH_SIZE // len(SUITES))
    suites = [Mini(suite=suite, num_prompts=num_each).prompts() for suite in SUITES]
    prompts = [prompt for together in zip(*suites, strict=True) for prompt in together][:BATCH_SIZE]
    requests = []
    for prompt in prompts:
        messages = [{"role": "user", "content": prompt.turns[0]}]
        requests.append(Request(prompt.id, 0, target.prompt_ids(messages), new_tokens))
    return requests


def make_contestants(target: TransformersTarget, draft: Draft) -> list[Contestant]:
    depths = NUM_DRAFT_TOKENS
    return [
        Contestant("transformers generate", 1, generated(target, batch_size=1)),
        Contestant("lkspec, no draft", 1, ours(target, None, batch_size=1)),
        Contestant(
            f"transformers prompt lookup, K = {depths}",
            1,
            generated(target, batch_size=1, prompt_lookup_num_tokens=depths),
        ),
        Contestant(f"lkspec, K = {depths}", 1, ours(target, draft, batch_size=1)),
        Contestant("transformers generate", BATCH_SIZE, generated(target, batch_size=BATCH_SIZE)),
        Contestant("lkspec, no draft", BATCH_SIZE, ours(target, None, batch_size=BATCH_SIZE)),
        Contestant(f"lkspec, K = {depths}", BATCH_SIZE, ours(target, draft, batch_size=BATCH_SIZE)),
    ]


def ours(target: TransformersTarget, draft: Draft | None, *, batch_size: int) -> Callable[[Sequence[Request]], Texts]:
    decoder = ChainDecoder(
        target, draft, sampling=GREEDY, num_draft_tokens=NUM_DRAFT_TOKENS if draft else 0, batch_size=batch_size
    )

    def answer(requests: Sequence[Request]) -> Texts:
        texts = {completion.request: completion.tokens for completion in decoder.run(requests)}
        return [texts[request] for request in requests]

    return answer


def generated(
    target: TransformersTarget, *, batch_size: int, prompt_lookup_num_tokens: int | None = None
) -> Callable[[Sequence[Request]], Texts]:
    """transformers' generate, rows padded on the left."""
    pad = target.eos_ids[0]
    options = {"do_sample": False, "pad_token_id": pad, "eos_token_id": list(target.eos_ids)}
    if prompt_lookup_num_tokens is not None:
        options["prompt_lookup_num_tokens"] = prompt_lookup_num_tokens

    def answer(requests: Sequence[Request]) -> Texts:
        texts: Texts = []
        for start in range(0, len(requests), batch_size):
            group = requests[start : start + batch_size]
            width = max(len(request.tokens) for request in group)
            ids = torch.tensor([[pad] * (width - len(request.tokens)) + [*request.tokens] for request in group])
            mask = torch.tensor([[0] * (width - len(request.tokens)) + [1] * len(request.tokens) for request in group])
            output = target.model.generate(ids, attention_mask=mask, max_new_tokens=group[0].max_new_tokens, **options)
            texts += [ended(row, target.eos_ids) for row in output[:, width:].tolist()]
        return texts

    return answer


def ended(tokens: list[int], eos_ids: Sequence[int]) -> tuple[int, ...]:
    """Up to the first end-of-text token; padding follows it."""
    for place, token in enumerate(tokens):
        if token in eos_ids:
            return tuple(tokens[: place + 1])
    return tuple(tokens)


def check_texts(target: TransformersTarget, contestants: Sequence[Contestant], requests: Sequence[Request]) -> None:
    """All write the same greedy text, up to near ties; counts tokens and the target's forward passes on the way."""
    expected = generated(target, batch_size=1)(requests)
    calls: list[int] = []
    handle = target.model.get_decoder().register_forward_hook(lambda *_: calls.append(1))
    for contestant in contestants:
        prompts = contestant.prompts(requests)
        calls.clear()
        texts = contestant.answer(prompts)
        contestant.num_forwards = len(calls)
        contestant.num_tokens = sum(map(len, texts))
        ties = sum(
            differs_at_near_tie(target, request, text, right)
            for request, text, right in zip(prompts, texts, expected, strict=False)
        )
        print(f"{contestant.name}, batch {contestant.batch_size}: {len(texts)} texts, {ties} differ after a near tie")
    handle.remove()


def differs_at_near_tie(
    target: TransformersTarget, request: Request, text: tuple[int, ...], right: tuple[int, ...]
) -> bool:
    """Whether texts differ; where they first do, the target's two best logits must be equal up to rounding."""
    if text == right:
        return False
    place = next((i for i, (a, b) in enumerate(zip(text, right, strict=False)) if a != b), None)
    if place is None:
        raise SystemExit(f"{request.prompt_id}: one text ends before the other: {text} and {right}")
    with torch.inference_mode():
        logits = target.model(torch.tensor([[*request.tokens, *right[:place]]])).logits[0, -1]
    first, second = logits.topk(2).values.tolist()
    if first - second > NEAR_TIE:
        raise SystemExit(f"{request.prompt_id}: token {place} is {text[place]}, not {right[place]}, and no near tie")
    return True


def measure(contestant: Contestant, requests: Sequence[Request]) -> None:
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    contestant.answer(contestant.prompts(requests))
    contestant.seconds.append(time.perf_counter() - wall)
    contestant.cpu_seconds.append(time.process_time() - cpu)


def row(contestant: Contestant, contestants: Sequence[Contestant]) -> dict[str, object]:
    """Speeds, beside transformers' generate at the same batch size."""
    reference = next(other for other in contestants if other.batch_size == contestant.batch_size)
    best, middle = min(contestant.seconds), statistics.median(contestant.seconds)
    cpu = [min(one.cpu_seconds) / one.num_tokens for one in (contestant, reference)]
    return {
        "batch": contestant.batch_size,
        "contestant": contestant.name,
        "tokens": contestant.num_tokens,
        "target forwards": contestant.num_forwards,
        "tokens/s, best": contestant.num_tokens / best,
        "tokens/s, median": contestant.num_tokens / middle,
        "of generate, best": (contestant.num_tokens / best) / (reference.num_tokens / min(reference.seconds)),
        "CPU ms/token, least": 1e3 * cpu[0],
        "of generate, CPU": cpu[0] / cpu[1],
    }


if __name__ == "__main__":
    main()
