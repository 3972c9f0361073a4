"""How fast captured states are read, and how fast a draft eats them: the same micro-batches, in turns.

python experiments/performance/captured.py [--states captured/smollm2_135m-embedded]

The draft is the cheapest there is, MEDUSA with one depth and 1,024 tokens. The first pass over the micro-batches checks
every conversation's checksum and may read the disk; later ones do neither.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from measuring import print_table

from lkspec.acceptance import draft_stats
from lkspec.data.captured import CapturedStates
from lkspec.data.datamodule import SpeculatorDataModule
from lkspec.drafts.medusa import Medusa
from lkspec.losses.in_forward import InForward
from lkspec.losses.objectives import KL, reduce_loss
from lkspec.targets.smollm2 import SmolLM2Target
from lkspec.vocab import DraftVocab

NUM_STEPS, DRAFT_VOCAB = 12, 1_024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--states", type=Path, default=Path("captured/smollm2_135m-embedded"))
    options = parser.parse_args()
    target = SmolLM2Target(device="cpu")
    data = SpeculatorDataModule(train="embedded:train.jsonl", max_length=1024, max_tokens=4096, limit_conversations=400)
    data.bind(target.tokenizer, eos_ids=target.eos_ids, max_positions=target.max_positions)
    data.setup()
    batches = [step[0] for step in data.train_dataloader()][:NUM_STEPS]
    captured = CapturedStates(options.states, target)
    draft = Medusa(target.spec, DraftVocab(torch.arange(DRAFT_VOCAB), target.vocab_size), num_depths=1)
    num_tokens = sum(int((batch.segments > 0).sum()) for batch in batches)
    seconds = {"first pass": 0.0, "later passes": 0.0, "the draft's step": 0.0}
    for name in ("first pass", "later passes"):
        for batch in batches:
            start = time.perf_counter()
            states = captured(batch)
            seconds[name] += time.perf_counter() - start
            if name == "later passes":
                start = time.perf_counter()
                counts = batch.depth_mask(1).sum((1, 2))
                stats = draft_stats(draft, batch, states, target.head, in_forward=InForward.of(KL(), counts))
                assert stats.value is not None
                reduce_loss(stats.value, stats.mask, counts).backward()
                seconds["the draft's step"] += time.perf_counter() - start
    width = target.spec.dims.hidden_size * (target.spec.num_aux + 1) * 2
    rows = [
        {"": name, "tokens/s": num_tokens / value, "MB/s": num_tokens * width / value / 1e6}
        for name, value in seconds.items()
    ]
    print_table(f"{num_tokens:,} tokens at {width:,} bytes, {torch.get_num_threads()} threads", rows)


if __name__ == "__main__":
    main()
