"""How fast captured states are read, and how fast drafts eat them: the same micro-batches, in turns.

python experiments/performance/captured.py [--states captured/smollm2_135m-embedded]

The drafts are the cheapest there is, MEDUSA with one depth and 1,024 tokens, and the MLP speculator of the ablations,
with four depths and 4,096. Each steps with the normalisers that a capture keeps, and without them, when the target's
head is multiplied whole. The first pass over the micro-batches checks every conversation's checksum and may read the
disk; later ones do neither.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from measuring import print_table

from lkspec.data.capture_format import bytes_per_token
from lkspec.data.captured import CapturedStates
from lkspec.data.datamodule import SpeculatorDataModule
from lkspec.drafts.base import Draft
from lkspec.drafts.medusa import Medusa
from lkspec.drafts.mlp import MLPSpeculator
from lkspec.losses.fused.in_forward import InForward
from lkspec.losses.objectives import KL, reduce_loss
from lkspec.targets.smollm2 import SmolLM2Target
from lkspec.training.statistics import draft_stats
from lkspec.types import Batch, LinearHead, TargetStates
from lkspec.vocab import DraftVocab

NUM_STEPS = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--states", type=Path, default=Path("captured/smollm2_135m-embedded"))
    options = parser.parse_args()
    target = SmolLM2Target(device="cpu")
    data = SpeculatorDataModule(  # of the ablations
        train="embedded:train.jsonl", max_length=1024, max_tokens=4096, val_fraction=0.18, limit_conversations=760
    )
    data.bind(target.tokenizer, eos_ids=target.eos_ids, max_positions=target.max_positions)
    data.adopt(data.read())
    batches = [step[0] for step in data.train_dataloader()][:NUM_STEPS]
    captured = CapturedStates(options.states, target)
    drafts: dict[str, Draft] = {
        "MEDUSA, K 1, D 1,024": Medusa(target.spec, DraftVocab(torch.arange(1_024), target.vocab_size), num_depths=1),
        "MLP, K 4, D 4,096": MLPSpeculator(
            target.spec, DraftVocab(torch.arange(4_096), target.vocab_size), num_depths=4
        ),
    }
    seconds: dict[str, float] = defaultdict(float)
    for name in ("reading, first pass", "reading, later passes"):
        for batch in batches:
            seconds[name] += _seconds(lambda batch=batch: captured(batch))
    for batch in batches:
        states = captured(batch)
        for name, draft in drafts.items():
            for kept, given in (("", states), (", without normalisers", replace(states, summary=None))):
                seconds[f"{name}{kept}"] += _seconds(_step(draft, batch, given, target.head))
    num_tokens = sum(int((batch.segments > 0).sum()) for batch in batches)
    rows = [{"": name, "seconds": value, "tokens/s": num_tokens / value} for name, value in seconds.items()]
    width = bytes_per_token(target)
    print_table(f"{num_tokens:,} tokens at {width:,} bytes, {torch.get_num_threads()} threads", rows)


def _step(draft: Draft, batch: Batch, states: TargetStates, head: LinearHead) -> Callable[[], None]:
    """Forward and backward under KL, as training runs them."""
    counts = batch.depth_mask(draft.num_depths).sum((1, 2))

    def run() -> None:
        draft.zero_grad()
        stats = draft_stats(draft, batch, states, head, in_forward=InForward.of(KL(), counts))
        assert stats.value is not None
        reduce_loss(stats.value, stats.mask, counts).backward()

    return run


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
