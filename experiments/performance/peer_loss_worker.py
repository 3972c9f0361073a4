"""Runs inside the peers' environment, which has no lkspec: speculators' eager losses, forward and backward.

Speaks JSON lines as ``peer_worker`` does. The file with the losses is read by its path: the package around it imports
what this environment need not have.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


def main() -> None:
    """Answers until the input ends."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    settings = json.loads(sys.stdin.readline())
    torch.set_num_threads(settings["threads"])
    peer = Peer(torch.load(settings["case"], weights_only=True))
    jobs: dict[str, Callable[..., Any]] = {"seconds": peer.seconds, "peak": peer.peak, "compare": peer.compare}
    print(json.dumps({"version": version("speculators")}), file=channel, flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        print(json.dumps(jobs[job.pop("kind")](**job)), file=channel, flush=True)


class Peer:
    """A loss of theirs on logits made from hidden states."""

    def __init__(self, case: dict[str, Tensor]) -> None:
        self.hidden, self.weight = (case[name].requires_grad_() for name in ("hidden", "weight"))
        self.target_hidden, self.target_weight = case["target_hidden"], case["target_weight"]
        found = importlib.util.find_spec("speculators")
        assert found is not None
        assert found.origin is not None
        self.losses = module(Path(found.origin).with_name("losses") / "eager.py")

    def step(self, loss: str) -> Tensor:
        """One forward and backward."""
        self.hidden.grad = self.weight.grad = None
        with torch.no_grad():
            targets = (self.target_hidden @ self.target_weight.T)[None]
        value = getattr(self.losses, loss)((self.hidden @ self.weight.T)[None], targets).mean()
        value.backward()
        return value.detach()

    def seconds(self, loss: str) -> float:
        """Wall time of a step."""
        start = time.perf_counter()
        self.step(loss)
        return time.perf_counter() - start

    def peak(self, loss: str) -> int:
        """Peak bytes of one step above its inputs, counted as ours are."""
        self.hidden.grad = self.weight.grad = None
        return module(Path(__file__).with_name("measuring.py")).peak_bytes(lambda: self.step(loss))

    def compare(self, loss: str, path: str) -> dict[str, float]:
        """The loss; the gradient of the hidden states goes to a file."""
        value = float(self.step(loss))
        torch.save(self.hidden.grad, path)
        return {"value": value}


def module(path: Path) -> ModuleType:
    """A file as a module of its own."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


if __name__ == "__main__":
    main()
