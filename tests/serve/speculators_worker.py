"""Runs inside the serving environment, which has speculators and not lkspec: logits of exported EAGLE-3 drafts.

Reads a JSON line a draft: ``folder``, ``inputs`` and ``outputs`` (safetensors files) and ``num_depths``.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from speculators import SpeculatorModel


@torch.no_grad()
def main() -> None:
    """Answers until the input ends."""
    for line in sys.stdin:
        job = json.loads(line)
        model = SpeculatorModel.from_pretrained(job["folder"]).eval()
        logits: list[Any] = []  # of every depth; forward returns their argmax only
        model.lm_head.register_forward_hook(lambda module, arguments, output, kept=logits: kept.append(output))
        model(**load_file(job["inputs"]), ttt_steps=job["num_depths"])
        found = {"logits": torch.cat(logits)}
        if model.d2t is not None:
            found["ids"] = model.d2t + torch.arange(len(model.d2t))
        save_file(found, job["outputs"])


if __name__ == "__main__":
    main()
