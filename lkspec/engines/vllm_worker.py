"""Runs inside the serving environment, which has vLLM and not lkspec: answers token prompts, counts acceptance.

Speaks JSON lines: the first line read holds the settings, every further one a job; one line is written for each. vLLM
prints to the standard output, so the answers go to a copy of it and the rest to the standard error.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

_PREFIX = "vllm:spec_decode_num_"


def main() -> None:
    """Answers until the input ends."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    settings = json.loads(sys.stdin.readline())
    import vllm

    engine = vllm.LLM(**settings)
    repaired = repair_temperatures()  # behind the engine's start, which puts a CPU build's own kernels in place
    jobs: dict[str, Callable[..., Any]] = {"answer": answer, "speed": speed}
    ready = {"version": vllm.__version__, "hardware": hardware(), "repaired": repaired}
    print(json.dumps(ready), file=channel, flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        print(json.dumps(jobs[job.pop("kind")](engine, **job)), file=channel, flush=True)


def hardware() -> str:
    """The name of the GPU, or CPU."""
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU"


def repair_temperatures() -> bool:
    """Replaces a rejection sampler's helper that some CPU builds have broken; whether that was necessary.

    It spreads one temperature a request over the request's tokens; the faulty one writes them into a copy that is then
    thrown away, so that drafts are verified at another temperature (vLLM issue 55005).
    """
    import torch
    from vllm.v1.sample import rejection_sampler

    def spread(values: Any, cumulative: Any, num_tokens: int, replace_from: int = 0, replace_to: int = 0) -> Any:
        counts = torch.diff(cumulative, prepend=cumulative.new_zeros(1))
        values = torch.where(values == replace_from, torch.full_like(values, replace_to), values)
        return torch.repeat_interleave(values, counts.to(torch.int64), output_size=num_tokens)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    values = torch.tensor([0.5, 0.0, 2.0], device=device)
    cumulative = torch.tensor([2, 3, 6], dtype=torch.int32, device=device)
    expected = torch.tensor([0.5, 0.5, 1.0, 2.0, 2.0, 2.0], device=device)
    found = rejection_sampler.expand_batch_to_tokens(values, cumulative, 6, replace_from=0, replace_to=1)
    broken = not torch.equal(found, expected)
    if broken:
        rejection_sampler.expand_batch_to_tokens = spread
        assert torch.equal(rejection_sampler.expand_batch_to_tokens(values, cumulative, 6, 0, 1), expected)
    return broken


def answer(engine: Any, prompts: list[dict[str, Any]], sampling: dict[str, Any]) -> list[dict[str, Any]]:
    """Answers prompts one after another, so that the engine's counters are each prompt's own."""
    import vllm

    rows = []
    for prompt in prompts:
        params = vllm.SamplingParams(**sampling, seed=prompt["seed"], max_tokens=prompt["max_tokens"])
        before, start = counters(engine), time.perf_counter()
        output = engine.generate([{"prompt_token_ids": prompt["tokens"]}], params, use_tqdm=False)[0].outputs[0]
        seconds, after = time.perf_counter() - start, counters(engine)
        rows.append(
            {
                "tokens": list(output.token_ids),
                "finish_reason": output.finish_reason,
                "seconds": seconds,
                "num_rounds": after["drafts"] - before["drafts"],
                "accepted_per_position": [
                    now - then for now, then in zip(after["per_position"], before["per_position"], strict=True)
                ],
            }
        )
    return rows


def speed(engine: Any, prompts: list[dict[str, Any]], sampling: dict[str, Any], concurrency: int) -> dict[str, Any]:
    """Answers prompts with so many under way at once, the next one in as soon as one is done.

    Gives ``num_tokens``, ``seconds``, and of each request with more than one token the seconds from its first token to
    its last by the tokens between.
    """
    import vllm
    from vllm.sampling_params import RequestOutputKind

    waiting = enumerate(prompts)
    running, num_tokens, per_token = 0, 0, []
    start = time.perf_counter()
    while True:
        for number, prompt in itertools.islice(waiting, concurrency - running):
            params = vllm.SamplingParams(**sampling, seed=prompt["seed"], max_tokens=prompt["max_tokens"])
            params.output_kind = RequestOutputKind.FINAL_ONLY
            engine.llm_engine.add_request(str(number), {"prompt_token_ids": prompt["tokens"]}, params)
            running += 1
        if running == 0:
            break
        for output in engine.llm_engine.step():
            if output.finished:
                running -= 1
                count = len(output.outputs[0].token_ids)
                num_tokens += count
                if count > 1:
                    times = output.metrics
                    per_token.append((times.last_token_ts - times.first_token_ts) / (count - 1))
    return {"num_tokens": num_tokens, "seconds": time.perf_counter() - start, "seconds_per_token": per_token}


def counters(engine: Any) -> dict[str, Any]:
    """The engine's own counts of speculative decoding since it was started."""
    found: dict[str, Any] = {"drafts": 0, "per_position": []}
    for metric in engine.get_metrics():
        if metric.name == f"{_PREFIX}drafts":
            found["drafts"] = metric.value
        elif metric.name == f"{_PREFIX}accepted_tokens_per_pos":
            found["per_position"] = list(metric.values)
    return found


if __name__ == "__main__":
    main()
