"""Training tokens per second of every draft, in turns on the same batch: the best of several steps each.

python experiments/drafts/speed.py
"""

from __future__ import annotations

import argparse
import time

import torch

from lkspec.data.datamodule import SpeculatorDataModule
from lkspec.drafts.base import Draft
from lkspec.drafts.eagle3 import Eagle3
from lkspec.drafts.medusa import Medusa
from lkspec.drafts.mlp import MLPSpeculator
from lkspec.drafts.mtp import MTP
from lkspec.losses.objectives import LKLambda, masked_sums, reduce_loss
from lkspec.targets.smollm2 import SmolLM2Target
from lkspec.training.statistics import draft_stats
from lkspec.types import Batch, TargetStates
from lkspec.vocab import DraftVocab

DRAFTS: dict[str, type[Draft]] = {"eagle3": Eagle3, "mtp": MTP, "mlp": MLPSpeculator, "medusa": Medusa}
NUM_DEPTHS, DRAFT_VOCAB = 4, 8_192


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=7)
    options = parser.parse_args()
    target = SmolLM2Target(device="cpu")
    batch = first_batch(target)
    states = target.states(batch)
    counts = torch.bincount(batch.tokens.flatten(), minlength=target.vocab_size)
    some = DraftVocab.from_counts(counts, DRAFT_VOCAB, keep=target.special_ids)
    full = DraftVocab.full(target.vocab_size)
    drafts = {
        name: made(target.spec, full if made.full_vocabulary else some, num_depths=NUM_DEPTHS)  # type: ignore[call-arg]
        for name, made in DRAFTS.items()
    }
    best = dict.fromkeys(drafts, float("inf"))
    for _ in range(options.steps):
        for name, draft in drafts.items():
            best[name] = min(best[name], step_seconds(draft, target, batch, states))
    num_tokens = int(batch.depth_mask(NUM_DEPTHS)[0].sum())
    print("| draft | trainable parameters | of the target | seconds a step | training tokens/s |")
    print("|---|---|---|---|---|")
    for name, draft in drafts.items():
        share = draft.num_trainable / target.num_parameters
        print(f"| {name} | {draft.num_trainable:,} | {share:.1%} | {best[name]:.2f} | {num_tokens / best[name]:.0f} |")
    print(
        f"\n{num_tokens} supervised tokens, {torch.get_num_threads()} threads, K = {NUM_DEPTHS}, "
        f"best of {options.steps} steps in turns"
    )


def first_batch(target: SmolLM2Target) -> Batch:
    """One micro-batch of the embedded conversations."""
    data = SpeculatorDataModule(
        train="embedded:train.jsonl", validation=[], max_length=320, max_tokens=768, limit_conversations=16, seed=0
    )
    data.bind(target.tokenizer, eos_ids=target.eos_ids, max_positions=target.max_positions)
    data.adopt(data.read())
    batch: Batch = max((batches[0] for batches in data.train_dataloader()), key=lambda b: b.num_supervised)
    return batch


def step_seconds(draft: Draft, target: SmolLM2Target, batch: Batch, states: TargetStates) -> float:
    """Forward and backward of one micro-batch under lk_lambda; the target's states are given."""
    objective = LKLambda(draft.paper_eta)
    start = time.perf_counter()
    draft.zero_grad()
    stats = draft_stats(draft, batch, states, target.head)
    sums = masked_sums(stats)
    values = objective.values(stats, (sums["alpha"] / sums["count"]).detach())
    reduce_loss(values, stats.mask, sums["count"], 0.8).backward()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
