"""A stand-in for vLLM: its interface as the worker uses it, with counters that follow from the prompt."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
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
    """Answers 7, 7, .. until ``max_tokens``; a prompt's length is the number of its rounds, each accepts one token.

    A target's folder may hold ``answers.json``, the answer to each prompt as text of its ids.
    """

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
    waiting: list = field(default_factory=list)
    most_waiting: int = 0

    def __post_init__(self) -> None:
        if self.model == "missing":
            raise OSError("no such model: missing")
        print(f"vLLM prints on the standard output; max_model_len {self.max_model_len}")
        folder = Path(self.model)
        if folder.is_dir():
            print(f"the target's folder holds {sorted(file.name for file in folder.iterdir())}")
        known = folder / "answers.json"
        self.answers = json.loads(known.read_text()) if known.is_file() else {}
        if self.speculative_config:
            self.per_position = [0] * self.speculative_config["num_speculative_tokens"]

    @property
    def llm_engine(self):
        return self

    def generate(self, prompts, params, use_tqdm):
        return [self._answer(prompt, params) for prompt in prompts]

    def add_request(self, request_id, prompt, params):
        assert params.output_kind == "final only"
        self.waiting.append((request_id, prompt, params))
        self.most_waiting = max(self.most_waiting, len(self.waiting))

    def step(self):
        """Ends the request that has waited longest; its time per token is the most that ever waited together."""
        _, prompt, params = self.waiting.pop(0)
        return [self._answer(prompt, params, seconds=float(self.most_waiting))]

    def _answer(self, prompt, params, seconds=0.5):
        if self.per_position:
            self.drafts += len(prompt["prompt_token_ids"])
            self.per_position[0] += len(prompt["prompt_token_ids"])
        tokens = self.answers.get(str(list(prompt["prompt_token_ids"])), [7] * params.max_tokens)
        completion = SimpleNamespace(token_ids=tokens, finish_reason="length")
        stats = SimpleNamespace(first_token_ts=1.0, last_token_ts=1.0 + seconds * (params.max_tokens - 1))
        return SimpleNamespace(outputs=[completion], metrics=stats, finished=True)

    def get_metrics(self):
        if not self.per_position:
            return []
        return [
            SimpleNamespace(name="vllm:spec_decode_num_drafts", value=self.drafts),
            SimpleNamespace(name="vllm:spec_decode_num_accepted_tokens_per_pos", values=self.per_position),
        ]
