"""Runs inside SpecForge's environment, which has no lkspec: its own EAGLE-3 model, one training step a request.

Speaks JSON lines: one request is read and one answer written a line. Libraries print to the standard output, so answers
go to a copy of it and the rest to the standard error. A step is what a user's step is without the optimiser: the
target's logits from its hidden states, the unroll, the loss, backward.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def main() -> None:
    """Answers until the input ends."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    settings = json.loads(sys.stdin.readline())
    torch.set_num_threads(settings["threads"])
    peer = Peer(torch.load(settings["case"], weights_only=True), settings["sizes"])
    jobs: dict[str, Callable[..., Any]] = {"seconds": peer.seconds, "peak": peer.peak, "compare": peer.compare}
    print(json.dumps({"version": peer.version}), file=channel, flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        print(json.dumps(jobs[job.pop("kind")](**job)), file=channel, flush=True)


class Peer:
    """SpecForge's ``OnlineEagle3Model`` with the weights and inputs of a case.

    Its loss is a Triton kernel, which needs a GPU: its own eager reference, compiled as it is there, stands in.
    """

    def __init__(self, case: dict[str, Any], sizes: dict[str, int]) -> None:
        from importlib.metadata import version

        import specforge.algorithms.eagle3.model as eagle3
        from specforge.core.loss import _compute_loss
        from specforge.modeling.draft.llama3_eagle import LlamaForCausalLMEagle3
        from transformers import LlamaConfig

        self.version = version("specforge")
        eagle3.LogSoftmaxLoss = type("EagerLoss", (), {"apply": staticmethod(_compute_loss)})
        config = LlamaConfig(**sizes, pad_token_id=0, hidden_act="silu", num_hidden_layers=1)
        self.draft = LlamaForCausalLMEagle3(config, attention_backend="sdpa")
        ids, self.case = case["vocab_ids"], case
        t2d = torch.zeros(config.vocab_size, dtype=torch.bool)
        t2d[ids] = True
        extra = {"t2d": t2d, "d2t": ids - torch.arange(len(ids)), "embed_tokens.weight": case["embedding"]}
        found = self.draft.load_state_dict({**case["weights"], **extra}, strict=False)
        assert not found.unexpected_keys, found
        assert all("rotary" in name for name in found.missing_keys), found
        self.draft.embed_tokens.weight.requires_grad_(False)
        self.models = {
            name: eagle3.OnlineEagle3Model(
                self.draft, length=case["num_depths"], attention_backend="sdpa",
                lk_loss_type=kind, kl_scale=1.0, kl_decay=case["eta"],
            )
            for name, kind in (("kl", None), ("lk_lambda", "lambda"))
        }  # fmt: skip

    def step(self, objective: str, compact: bool) -> list[Any]:
        """One forward and backward; ``compact`` is its path from hidden states to the target's columns in chunks."""
        self.draft.zero_grad(set_to_none=True)
        case = self.case
        last = shifted(case["last"])
        options = {"target_hidden_for_compact": last, "target_head_weight": case["target_head"]} if compact else {}
        outputs = self.models[objective](
            input_ids=shifted(case["tokens"]),
            attention_mask=torch.ones_like(case["tokens"]),
            target=None if compact else last @ case["target_head"].T,
            loss_mask=case["loss_mask"],
            hidden_states=case["aux"],
            **options,
        )
        sum(case["gamma"] ** depth * loss for depth, loss in enumerate(outputs[0])).backward()
        return outputs

    def seconds(self, objective: str, compact: bool, clock: str) -> float:
        """One step by a clock of ``time``."""
        now = getattr(time, clock)
        start = now()
        self.step(objective, compact)
        return now() - start

    def peak(self, objective: str, compact: bool) -> int:
        """Peak bytes of one step above the built model, counted as ours are."""
        spec = importlib.util.spec_from_file_location("measuring", Path(__file__).with_name("measuring.py"))
        assert spec is not None
        assert spec.loader is not None
        measuring = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(measuring)
        return measuring.peak_bytes(lambda: self.step(objective, compact))

    def compare(self, path: str) -> dict[str, list[float]]:
        """Mean alpha of each depth; what multiplies the head at depth 1 goes to a file."""
        read: list[Tensor] = []
        handle = self.draft.lm_head.register_forward_pre_hook(lambda _, args: read.append(args[0].detach()))
        alphas = self.step("lk_lambda", False)[1]
        handle.remove()
        torch.save(read[0], path)
        return {"alpha": [float(alpha) for alpha in alphas]}


def shifted(rows: Tensor) -> Tensor:
    """Slot t holds what stood at t + 1, as its data pipeline passes tokens and targets."""
    return torch.cat([rows[:, 1:], torch.zeros_like(rows[:, :1])], dim=1)


if __name__ == "__main__":
    main()
