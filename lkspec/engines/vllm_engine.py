"""vLLM as the engine: answers benchmark prompts in a virtual environment of its own and reads vLLM's own counters."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from lkspec.decoding.chain import Completion, Request
from lkspec.decoding.sampling import Sampling
from lkspec.types import Round

console = Console(stderr=True)

_WORKER = Path(__file__).parent / "vllm_worker.py"
_NO_POSITION = -1  # the engine counts rounds, it does not say where they were


class VllmEngine:
    """A vLLM process a number of draft tokens: that of the target alone (0) and that of the last K are kept.

    Args:
        python: the interpreter of the serving environment (``make serve-env``).
        dtype: float32 makes its greedy answers comparable token by token.
        max_model_len: context, in tokens.
        kv_cache_gb: of a CPU build; GPUs take ``options.gpu_memory_utilization``.
        options: further arguments of ``vllm.LLM``.
        log: file for what vLLM prints.

    Raises:
        ValueError: no such interpreter, or vLLM ended (with the last lines of its log).
    """

    name = "vllm"

    def __init__(
        self,
        *,
        python: str,
        dtype: str = "float32",
        max_model_len: int = 4096,
        kv_cache_gb: int = 1,
        options: dict[str, Any] | None = None,
        log: str = "vllm.log",
    ) -> None:
        if not Path(python).expanduser().is_file():
            raise ValueError(
                f"engine.python: expected the interpreter of an environment with vLLM, found nothing at {python}; "
                "`make serve-env` makes one"
            )
        self._python = str(Path(python).expanduser().absolute())
        self._llm = {"dtype": dtype, "max_model_len": max_model_len, **(options or {})}
        self._kv_cache_gb = kv_cache_gb
        self._log = Path(log)
        self._target: str | None = None
        self._draft: dict[str, Any] = {}
        self._eos_ids: list[int] = []
        self._processes: dict[int, subprocess.Popen[str]] = {}
        self.version = ""

    def serve(self, target: str, draft: dict[str, Any], eos_ids: Sequence[int]) -> None:
        """Says what to serve: the target's folder or hub id, and the draft in vLLM's words (``method``, ``model``)."""
        self._target, self._draft, self._eos_ids = target, draft, list(eos_ids)

    def decoder(self, sampling: Sampling, *, num_draft_tokens: int, seed: int) -> VllmDecoder:
        """What answers requests at one setting, started already; 0 draft tokens serve the target alone.

        Raises:
            ValueError: filters that also apply to q, which vLLM does not do.
        """
        if sampling.draft_filter == "same":
            raise ValueError("engine=vllm filters the target's distribution only: set draft_filter=none")
        if num_draft_tokens not in self._processes:
            for other in [k for k in self._processes if k > 0 and num_draft_tokens > 0]:
                _end(self._processes.pop(other))
            self._start(num_draft_tokens)
        return VllmDecoder(self, sampling, num_draft_tokens, seed)

    def ask(self, num_draft_tokens: int, job: dict[str, Any]) -> Any:
        """One job's answer from the process of a K.

        Raises:
            ValueError: vLLM ended.
        """
        return self._exchange(self._processes[num_draft_tokens], job)

    def params(self, sampling: Sampling) -> dict[str, Any]:
        """Sampling in vLLM's words."""
        return {
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "stop_token_ids": self._eos_ids,
            "detokenize": False,
        }

    def _start(self, num_draft_tokens: int) -> None:
        assert self._target is not None, "call serve first"
        settings: dict[str, Any] = {
            "model": self._target,
            "skip_tokenizer_init": True,
            "disable_log_stats": False,
            "enforce_eager": True,
            "enable_prefix_caching": False,
            **self._llm,
        }
        if num_draft_tokens:
            settings["speculative_config"] = {**self._draft, "num_speculative_tokens": num_draft_tokens}
        environment = {
            **os.environ,
            "VLLM_CPU_KVCACHE_SPACE": str(self._kv_cache_gb),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        }
        with self._log.open("a", encoding="utf-8") as log:
            process = subprocess.Popen(
                [self._python, str(_WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
            )
        self._processes[num_draft_tokens] = process
        with console.status(f"starting vLLM with K={num_draft_tokens} (its log: {self._log})"):
            ready = self._exchange(process, settings)
        self.version = ready["version"]
        if ready["repaired"]:
            console.print(f"vLLM {self.version}: its verification lost the temperature; worked around for this process")

    def _exchange(self, process: subprocess.Popen[str], message: dict[str, Any]) -> Any:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(message) + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended: its log, below, says why
        line = process.stdout.readline()
        if not line:
            tail = "\n".join(self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
            raise ValueError(f"vLLM ended (exit code {process.wait()}); the end of {self._log}:\n{tail}")
        return json.loads(line)

    def close(self) -> None:
        """Ends the processes."""
        while self._processes:
            _end(self._processes.popitem()[1])


def _end(process: subprocess.Popen[str]) -> None:
    if process.stdin is not None:
        process.stdin.close()
    process.wait()


class VllmDecoder:
    """Answers requests one after another; rounds are counted, not located."""

    def __init__(self, engine: VllmEngine, sampling: Sampling, num_draft_tokens: int, seed: int) -> None:
        self._engine, self._sampling = engine, sampling
        self._num_draft_tokens, self._seed = num_draft_tokens, seed

    def run(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Completions in the order of the requests."""
        for request in requests:
            prompt = {
                "tokens": list(request.tokens),
                "max_tokens": request.max_new_tokens,
                "seed": _seed(self._seed, request),
            }
            job = {"kind": "answer", "prompts": [prompt], "sampling": self._engine.params(self._sampling)}
            [row] = self._engine.ask(self._num_draft_tokens, job)
            yield Completion(
                request=request,
                tokens=tuple(row["tokens"]),
                writers=(),
                finish_reason=row["finish_reason"],
                rounds=counted_rounds(row["num_rounds"], row["accepted_per_position"]),
            )


def counted_rounds(num_rounds: int, accepted_per_position: Sequence[int]) -> tuple[Round, ...]:
    """The rounds behind an engine's counters: position k counts the rounds in which at least k tokens were accepted."""
    at_least = [num_rounds, *accepted_per_position, 0]
    return tuple(
        Round(position=_NO_POSITION, accepted=accepted, past_end=False)
        for accepted in range(len(at_least) - 1)
        for _ in range(at_least[accepted] - at_least[accepted + 1])
    )


def _seed(seed: int, request: Request) -> int:
    digest = hashlib.sha256(f"{seed} {request.prompt_id} {request.turn}".encode()).digest()
    return int.from_bytes(digest[:4], "little")
