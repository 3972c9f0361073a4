"""vLLM as the engine: answers benchmark prompts in a virtual environment of its own and reads vLLM's own counters."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lkspec.decoding.chain import Completion, Request
from lkspec.decoding.sampling import Sampling
from lkspec.engines.base import OneByOne, Speed, counted_rounds, request_seed
from lkspec.reporting.terminal import errors

_WORKER = Path(__file__).parent / "vllm_worker.py"


class VllmEngine:
    """A vLLM process a number of draft tokens: that of the target alone (0) and that of the last K are kept.

    Args:
        python: the interpreter of the serving environment (``make serve-env``).
        dtype: float32 makes its greedy answers comparable token by token.
        max_model_len: context, in tokens; never more than the target's.
        kv_cache_gb: of a CPU build; GPUs take ``options.gpu_memory_utilization``.
        options: further arguments of ``vllm.LLM``.
        log: file for what vLLM prints.

    Raises:
        ValueError: no such interpreter, or vLLM ended (with the last lines of its log).
    """

    name = "vllm"
    serves_alone = True  # the target without a draft, beside it with one

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
        self.hardware = ""

    @property
    def protocol(self) -> dict[str, Any]:
        """What measurements depend on beside the sampling; the version is known once a process has started."""
        return {"engine_version": f"vLLM {self.version}", "engine_settings": self._llm}

    def serve(
        self, target: str, draft: dict[str, Any], eos_ids: Sequence[int], *, max_positions: int | None = None
    ) -> None:
        """Says what to serve: the target's folder or hub id with its context limit, and the draft in vLLM's words
        (``method``, ``model``)."""
        self._target, self._draft, self._eos_ids = target, draft, list(eos_ids)
        if max_positions is not None:
            self._llm["max_model_len"] = min(self._llm["max_model_len"], max_positions)

    def decoder(self, sampling: Sampling, *, num_draft_tokens: int, seed: int) -> OneByOne:
        """What answers requests at one setting, started already; 0 draft tokens serve the target alone.

        Raises:
            ValueError: filters that also apply to q, which vLLM does not do.
        """
        if sampling.draft_filter == "same":
            raise ValueError("engine=vllm filters the target's distribution only: set draft_filter=none")
        process = self._process(num_draft_tokens, keep=(0,) if num_draft_tokens else tuple(self._processes))

        def answer(request: Request) -> Completion:
            [row] = self._exchange(process, self._job("answer", [request], sampling, seed))
            return Completion(
                request=request,
                tokens=tuple(row["tokens"]),
                writers=(),
                finish_reason=row["finish_reason"],
                rounds=counted_rounds(row["num_rounds"], row["accepted_per_position"]),
            )

        return OneByOne(answer)

    def throughput_depths(self, wanted: Sequence[int]) -> list[int]:
        """The K to measure the speed at: those that are wanted."""
        return list(wanted)

    def speed(
        self, requests: Sequence[Request], sampling: Sampling, *, num_draft_tokens: int, concurrency: int, seed: int
    ) -> Speed:
        """Answers requests, so many at a time, in a process that has the machine to itself."""
        job = self._job("speed", requests, sampling, seed)
        found = self._exchange(self._process(num_draft_tokens, keep=()), {**job, "concurrency": concurrency})
        return Speed(found["num_tokens"], found["seconds"], tuple(found["seconds_per_token"]))

    def _job(self, kind: str, requests: Sequence[Request], sampling: Sampling, seed: int) -> dict[str, Any]:
        """Requests and sampling in vLLM's words."""
        words = {
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "stop_token_ids": self._eos_ids,
            "detokenize": False,
        }
        prompts = [
            {
                "tokens": list(request.tokens),
                "max_tokens": request.max_new_tokens,
                "seed": request_seed(seed, request),
            }
            for request in requests
        ]
        return {"kind": kind, "prompts": prompts, "sampling": words}

    def _process(self, num_draft_tokens: int, *, keep: Sequence[int]) -> subprocess.Popen[str]:
        """The process of a K, started where it is not running; of the others those to keep go on."""
        for other in [k for k in self._processes if k != num_draft_tokens and k not in keep]:
            _end(self._processes.pop(other))
        if num_draft_tokens not in self._processes:
            self._start(num_draft_tokens)
        return self._processes[num_draft_tokens]

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
        with errors.status(f"starting vLLM with K={num_draft_tokens} (its log: {self._log})"):
            ready = self._exchange(process, settings)
        self.version, self.hardware = ready["version"], ready["hardware"]
        if ready["repaired"]:
            errors.print(f"vLLM {self.version}: its verification lost the temperature; worked around for this process")

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
