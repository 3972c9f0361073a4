"""Do unsure proposals want another sharpness than sure ones? Tokens in parts by the entropy of the draft's own q.

At depth 1, along answers that the target sampled at T = 1: alpha with q^s in each part, and what an s chosen for each
part (on the answers of even number) gets on those of odd number, beside one s for all. A server knows q's entropy, so
that an s for each token would be as lossless as one for all.

    python experiments/ablations/by_entropy.py --run runs/ablation_gpu/eagle3-kl-smollm2_135m-s0-.. [--every 3]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

import lkspec.data
from lkspec.app.load import TrainedRun, load_run
from lkspec.data.chat import Encoded
from lkspec.data.dataset import collate
from lkspec.data.tokenised import read_tokenised
from lkspec.measure.tokens import target_entropy
from lkspec.runs.folder import RunFolder
from lkspec.training.statistics import draft_stats

ANSWERS = Path(lkspec.data.__file__).parent / "embedded" / "validation_t1.jsonl"


class Tokens(NamedTuple):
    """Of each token that depth 1 proposes: the number of its answer, entropies in nats, and alpha with each s."""

    answer: Int[Tensor, " N"]
    of_target: Float[Tensor, " N"]
    of_draft: Float[Tensor, " N"]
    alpha: Float[Tensor, "s N"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, type=Path, help="the folder of a finished run")
    parser.add_argument(
        "--answers", default=str(ANSWERS), help="sampled by its target at T = 1; default: the packaged ones"
    )
    parser.add_argument("--sharpness", nargs="+", type=float, default=[1.0, 1.125, 1.25, 1.5, 2.0])
    parser.add_argument("--parts", type=int, default=8)
    parser.add_argument("--every", type=int, default=1, help="takes each n-th answer")
    options = parser.parse_args()
    try:
        run = load_run(RunFolder(options.run))
        target = run.target
        store = read_tokenised(
            options.answers, target.tokenizer, max_length=target.max_positions, eos_ids=target.eos_ids
        )
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if set(store.temperatures) != {1.0}:
        parser.error(
            f"--answers {options.answers}: expected answers sampled at temperature 1, got {set(store.temperatures)}"
        )
    tokens = measure(run, [store[index] for index in range(0, len(store), options.every)], options.sharpness)
    show(tokens, options.sharpness, options.parts)


@torch.inference_mode()
def measure(run: TrainedRun, answers: Sequence[Encoded], sharpness: Sequence[float]) -> Tokens:
    """All tokens of some answers that depth 1 proposes."""
    found = []
    for number, answer in enumerate(answers):
        batch = collate([[answer]]).to(run.target.device)
        states = run.target.states(batch)
        anchors = batch.depth_mask(1)[0, 0].nonzero()[:, 0]
        hidden = run.draft.unroll(batch, states, 1)[0, 0, anchors]
        alphas = [
            draft_stats(run.draft, batch, states, run.target.head, num_depths=1, sharpness=power).log_alpha.exp()
            for power in sharpness
        ]
        found.append(
            Tokens(
                torch.full_like(anchors, number),
                target_entropy(states.last[0], run.target.head)[anchors + 1],
                torch.special.entr(run.draft.head(1).logits(hidden).float().softmax(-1)).sum(-1),
                torch.stack([alpha[0, 0, anchors] for alpha in alphas]),
            )
        )
    return Tokens(*(torch.cat(parts, dim=-1).cpu() for parts in zip(*found, strict=True)))


def show(tokens: Tokens, sharpness: Sequence[float], num_parts: int) -> None:
    """Prints the parts as a Markdown table, and what choosing s by part gets."""
    part = parts_of(tokens.of_draft, num_parts)
    rows = [["entropy of q", "of p", *(f"s = {power:g}" for power in sharpness)]]
    rows.append(["--:"] * len(rows[0]))
    for number in range(num_parts):
        inside = part == number
        low, high = (f"{float(edge(tokens.of_draft[inside])):.2f}" for edge in (torch.min, torch.max))
        alphas = [f"{float(alpha):.3f}" for alpha in tokens.alpha[:, inside].mean(1)]
        rows.append([f"{low} to {high}", f"{float(tokens.of_target[inside].mean()):.2f}", *alphas])
    means = [f"{float(alpha):.3f}" for alpha in tokens.alpha.mean(1)]
    rows.append([f"all, {tokens.of_draft.mean():.2f}", f"{float(tokens.of_target.mean()):.2f}", *means])
    print("\n".join(f"| {' | '.join(row)} |" for row in rows))
    chosen, one, each = choose(tokens, part, num_parts)
    told = ", ".join(f"{sharpness[index]:g}" for index in chosen)
    print(f"on answers of odd number: {one:.4f} with one s, {each:.4f} with one for each part ({told})")


def parts_of(entropy: Float[Tensor, " N"], num_parts: int) -> Int[Tensor, " N"]:
    """Parts of equal size, the surest first."""
    return entropy.argsort().argsort() * num_parts // len(entropy)


def choose(tokens: Tokens, part: Int[Tensor, " N"], num_parts: int) -> tuple[list[int], float, float]:
    """The index of s for each part, best on answers of even number; alpha on the others with one s and with these."""
    even = tokens.answer % 2 == 0
    chosen = [int(tokens.alpha[:, even & (part == number)].mean(1).argmax()) for number in range(num_parts)]
    one = tokens.alpha[int(tokens.alpha[:, even].mean(1).argmax()), ~even].mean()
    each = tokens.alpha.gather(0, torch.tensor(chosen)[part][None])[0, ~even].mean()
    return chosen, float(one), float(each)


if __name__ == "__main__":
    main()
