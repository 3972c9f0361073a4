"""How engines are started with an export."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

SAMPLES = {"draft_sample_method": "probabilistic"}  # vLLM drafts by argmax without it


@dataclass(frozen=True)
class ServeCommand:
    """How an engine is started with an export; ``options_for_q`` says which of its words make it sample from q."""

    engine: str
    command: str
    options_for_q: str


def vllm_command(words: Mapping[str, str], target: str, num_draft_tokens: int, *, draft: str | None) -> ServeCommand:
    """vLLM with a draft of the given words (``method``, ..), beside the target or, without a path, inside it."""
    model = {} if draft is None else {"model": draft}
    options = {"method": words["method"], **model, "num_speculative_tokens": num_draft_tokens, **words}
    return ServeCommand(
        "vLLM",
        f"vllm serve {target} --speculative-config '{json.dumps(options)}'",
        '"draft_sample_method": "probabilistic" (its name differs in older versions)'
        if SAMPLES.items() <= words.items()
        else f"none: vLLM drafts by argmax at every temperature with method {words['method']}",
    )


def sglang_command(algorithm: str, target: str, num_draft_tokens: int, *, draft: str | None) -> ServeCommand:
    """SGLang with a chain draft, beside the target or, without a path, inside it."""
    path = "" if draft is None else f"--speculative-draft-model-path {draft} "
    return ServeCommand(
        "SGLang",
        f"python -m sglang.launch_server --model-path {target} --speculative-algorithm {algorithm} {path}"
        f"--speculative-num-steps {num_draft_tokens} --speculative-eagle-topk 1 "
        f"--speculative-num-draft-tokens {num_draft_tokens + 1} --speculative-use-rejection-sampling",
        "--speculative-use-rejection-sampling (with --speculative-eagle-topk 1)",
    )
