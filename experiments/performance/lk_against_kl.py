"""What LK-lambda costs a whole EAGLE-3 training step, against KL; the target's states are given.

Kept normalisers are what a capture, or every epoch but the first with ``states_memory_gb``, brings along with them.

python experiments/performance/lk_against_kl.py
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from measuring import MIB, interleaved_seconds, peak_bytes, print_table, write_csv

from lkspec.drafts.eagle3 import Eagle3
from lkspec.losses.fused.head_summary import head_summary
from lkspec.losses.fused.in_forward import InForward
from lkspec.losses.objectives import KL, LKAlpha, LKLambda, Objective, masked_sums, reduce_loss
from lkspec.training.statistics import draft_stats
from lkspec.types import Batch, DecoderDims, LinearHead, TargetSpec, TargetStates
from lkspec.vocab import DraftVocab

HIDDEN, NUM_HEADS, NUM_KV_HEADS, FFN = 256, 8, 2, 688
TARGET_VOCAB, DRAFT_VOCAB, NUM_SLOTS, NUM_DEPTHS = 32_000, 8_000, 256, 7
NUM_THREADS = 2


def main() -> None:
    torch.set_num_threads(NUM_THREADS)
    draft, batch, states, head = make_step_inputs()
    kept = replace(states, summary=head_summary(head, states.last))
    steps: dict[str, Callable[[], object]] = {
        "kl, recompute": step(draft, batch, states, head, KL(), in_forward=False),
        "lk_lambda, recompute": step(draft, batch, states, head, LKLambda(), in_forward=False),
        "kl, in forward": step(draft, batch, states, head, KL(), in_forward=True),
        "lk_lambda, in forward": step(draft, batch, states, head, LKLambda(), in_forward=True),
        "lk_alpha, in forward": step(draft, batch, states, head, LKAlpha(), in_forward=True),
        "lk_lambda fixed, in forward": step(draft, batch, states, head, LKLambda(fixed_lambda=0.5), in_forward=True),
        "kl with kept normalisers, in forward": step(draft, batch, kept, head, KL(), in_forward=True),
        "lk_lambda with kept normalisers, in forward": step(draft, batch, kept, head, LKLambda(), in_forward=True),
    }
    seconds = interleaved_seconds(steps, rounds=12)
    rows: list[dict[str, object]] = []
    for name, work in steps.items():
        draft.zero_grad()
        rows.append(
            {
                "step": name,
                "seconds": seconds[name],
                "of kl in the same mode": seconds[name] / seconds["kl, " + name.rpartition(", ")[2]],
                "of fastest kl": seconds[name] / min(seconds["kl, recompute"], seconds["kl, in forward"]),
                "peak MiB": peak_bytes(work) / MIB,
            }
        )
    print_table(f"EAGLE-3 step, S = {NUM_SLOTS}, K = {NUM_DEPTHS}, V = {TARGET_VOCAB:,}, D = {DRAFT_VOCAB:,}", rows)
    write_csv(Path(__file__).with_suffix(".csv"), rows)


def make_step_inputs() -> tuple[Eagle3, Batch, TargetStates, LinearHead]:
    """A draft, one row of text and random states."""
    torch.manual_seed(0)
    head_dim = HIDDEN // NUM_HEADS
    dims = DecoderDims(
        hidden_size=HIDDEN,
        num_heads=NUM_HEADS,
        num_kv_heads=NUM_KV_HEADS,
        head_dim=head_dim,
        ffn_size=FFN,
        rms_norm_eps=1e-5,
        max_positions=4 * NUM_SLOTS,
        inv_freq=10_000.0 ** (-torch.arange(head_dim // 2) / (head_dim // 2)),
        rope_attention_factor=1.0,
        rope_parameters={},
    )
    head = LinearHead(2 * HIDDEN**-0.5 * torch.randn(TARGET_VOCAB, HIDDEN))
    spec = TargetSpec(
        dims=dims,
        embedding=torch.randn(TARGET_VOCAB, HIDDEN),
        head=head,
        num_aux=3,
        model_type="llama",
        new_layer=lambda copied: torch.nn.Identity(),
    )
    vocab = DraftVocab(torch.arange(DRAFT_VOCAB) * (TARGET_VOCAB // DRAFT_VOCAB), TARGET_VOCAB)
    ones = torch.ones(1, NUM_SLOTS, dtype=torch.int64)
    tokens = torch.randint(TARGET_VOCAB, (1, NUM_SLOTS))
    batch = Batch(tokens, torch.arange(NUM_SLOTS)[None], ones, ones, (("text",),))
    states = TargetStates(aux=torch.randn(1, NUM_SLOTS, 3 * HIDDEN), last=torch.randn(1, NUM_SLOTS, HIDDEN))
    return Eagle3(spec, vocab, num_depths=NUM_DEPTHS), batch, states, head


def step(
    draft: Eagle3, batch: Batch, states: TargetStates, head: LinearHead, objective: Objective, *, in_forward: bool
) -> Callable[[], None]:
    """Forward, backward, clipping and AdamW, as ``SpeculatorModule`` does them."""
    parameters = [parameter for parameter in draft.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-6)
    counts = batch.depth_mask(NUM_DEPTHS).sum((1, 2))
    promised = InForward.of(objective, counts) if in_forward else None

    def run() -> None:
        optimizer.zero_grad()
        stats = draft_stats(draft, batch, states, head, in_forward=promised)
        sums = masked_sums(stats)
        values = objective.values(stats, sums["alpha"] / sums["count"]) if stats.value is None else stats.value
        assert (stats.value is not None) == in_forward
        reduce_loss(values, stats.mask, counts).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()

    return run


if __name__ == "__main__":
    main()
