"""At T = 0 speculative decoding on the real model writes, token for token, what transformers' own generate writes."""

import pytest
import torch

from lkspec.decoding.chain import ChainDecoder, Request
from lkspec.decoding.sampling import Sampling
from lkspec.drafts.eagle3 import Eagle3
from lkspec.vocab import DraftVocab

NUM_NEW = 12
NEAR_TIE = 1e-4  # two best logits closer than this may swap under another order of summation
QUESTIONS = (
    "What is 17 times 23?",
    "Write a Python function that reverses a list.",
    "Why do leaves change colour in autumn? Answer in two sentences.",
)


@pytest.fixture(scope="module")
def prompts(smollm2):
    return [smollm2.prompt_ids([{"role": "user", "content": question}]) for question in QUESTIONS]


@pytest.fixture(scope="module")
def greedy(smollm2, prompts):
    answers = []
    for prompt in prompts:
        ids = smollm2.model.generate(torch.tensor([prompt]), max_new_tokens=NUM_NEW, do_sample=False)
        answers.append(tuple(ids[0, len(prompt) :].tolist()))
    return answers


def make_draft(smollm2) -> Eagle3:
    """Untrained, but of the target's own frequent tokens: it is rejected nearly always, and at times accepted."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Eagle3(smollm2.spec, DraftVocab(torch.arange(0, 8192), smollm2.vocab_size)).eval()


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 3])
def test_greedy_text_is_the_targets_own(smollm2, prompts, greedy, batch_size):
    decoder = ChainDecoder(
        smollm2,
        make_draft(smollm2),
        sampling=Sampling(temperature=0.0),
        num_draft_tokens=4,
        batch_size=batch_size,
    )
    requests = [Request(str(index), 0, prompt, NUM_NEW) for index, prompt in enumerate(prompts)]
    for completion in decoder.run(requests):
        index = int(completion.request.prompt_id)
        if completion.tokens != greedy[index]:
            assert_near_tie(smollm2, prompts[index], completion.tokens, greedy[index])


def assert_near_tie(smollm2, prompt, decoded, expected):
    """A difference is allowed only where the target's two best logits are equal up to rounding; it is printed."""
    at = next(i for i, (a, b) in enumerate(zip(decoded, expected, strict=False)) if a != b)
    with torch.no_grad():
        logits = smollm2.model(torch.tensor([prompt + expected[:at]])).logits[0, -1]
    best = logits.topk(2).values
    print(f"token {at}: {decoded[at]} instead of {expected[at]}, two best logits {best.tolist()}")
    assert float(best[0] - best[1]) < NEAR_TIE
