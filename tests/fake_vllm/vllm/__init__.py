"""A stand-in for vLLM: its interface as the worker uses it, with counters that follow from the prompt."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

__version__ = "0.0-fake"


@dataclass
class SamplingParams:
    temperature: float
    top_k: int
    top_p: float
    stop_token_ids: list
    detokenize: bool
    seed: int | None = None
    max_tokens: int = 16


@dataclass
class LLM:
    """Answers 7, 7, .. until ``max_tokens``; a prompt's length is the number of its rounds, each accepts one token."""

    model: str
    skip_tokenizer_init: bool
    disable_log_stats: bool
    enforce_eager: bool
    enable_prefix_caching: bool
    dtype: str
    max_model_len: int
    speculative_config: dict | None = None
    drafts: int = 0
    per_position: list = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.model == "missing":
            raise OSError("no such model: missing")
        print("vLLM prints on the standard output")
        if self.speculative_config:
            self.per_position = [0] * self.speculative_config["num_speculative_tokens"]

    def generate(self, prompts, params, use_tqdm):
        outputs = []
        for prompt in prompts:
            if self.per_position:
                self.drafts += len(prompt["prompt_token_ids"])
                self.per_position[0] += len(prompt["prompt_token_ids"])
            completion = SimpleNamespace(token_ids=[7] * params.max_tokens, finish_reason="length")
            stats = SimpleNamespace(first_token_ts=1.0, last_token_ts=1.0 + 0.5 * (params.max_tokens - 1))
            outputs.append(SimpleNamespace(outputs=[completion], metrics=stats))
        return outputs

    def get_metrics(self):
        if not self.per_position:
            return []
        return [
            SimpleNamespace(name="vllm:spec_decode_num_drafts", value=self.drafts),
            SimpleNamespace(name="vllm:spec_decode_num_accepted_tokens_per_pos", values=self.per_position),
        ]
