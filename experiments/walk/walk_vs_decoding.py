"""Does the walk along stored text give the acceptance length of real decoding?

Decodes the validation prompts of a run and walks the stored answers to the same prompts, which the target wrote without
any draft. Both count only rounds whose K proposals lie inside the text, of texts cut at the same length. The interval
resamples prompts, both sides together.

    python experiments/walk/walk_vs_decoding.py --run latest
"""

from __future__ import annotations

import argparse
import csv
import time
from pathlib import Path

from lkspec.app.application import quiet_libraries
from lkspec.app.build import open_data
from lkspec.app.load import TrainedRun, load_run
from lkspec.data.chat import Encoded
from lkspec.decoding.chain import ChainDecoder, Request
from lkspec.decoding.sampling import Sampling
from lkspec.measure.metrics import PromptRounds, group_counts, paired_difference_interval
from lkspec.measure.walk import walk_texts
from lkspec.runs.find import find_run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="latest")
    parser.add_argument("--run-root", type=Path, default=Path("runs"))
    parser.add_argument("--num-draft-tokens", type=int, default=4)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--num-prompts", type=int, default=None)
    parser.add_argument("--batch-size", type=int, default=24)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results.csv"))
    options = parser.parse_args()
    quiet_libraries()
    run = load_run(find_run(options.run, options.run_root))
    held_out = open_data(run.config, run.target).validation_set
    rows = [
        compare(
            run,
            [one for one in held_out if one.temperature == temperature][: options.num_prompts],
            temperature,
            options,
        )
        for temperature in (0.0, 1.0)
    ]
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print(", ".join(f"{name} {value}" for name, value in row.items()))


def compare(
    run: TrainedRun, conversations: list[Encoded], temperature: float, options: argparse.Namespace
) -> dict[str, object]:
    """One temperature: tau measured, tau walked, and the interval of their difference."""
    depths, limit = options.num_draft_tokens, options.max_new_tokens
    starts = {c.id: c.turns.index(1) for c in conversations}
    decoder = ChainDecoder(
        run.target,
        run.draft,
        sampling=Sampling(temperature=temperature),
        num_draft_tokens=depths,
        batch_size=options.batch_size,
    )
    begin = time.monotonic()
    requests = [Request(c.id, 0, tuple(c.tokens[: starts[c.id]]), limit) for c in conversations]
    decoded = [
        PromptRounds(c.request.prompt_id, c.request.prompt_id, c.rounds, len(c.tokens)) for c in decoder.run(requests)
    ]
    seconds = time.monotonic() - begin
    measured = group_counts(decoded, exclude_past_end=True)
    texts = [(c.id, c.tokens[: starts[c.id]], c.tokens[starts[c.id] :][:limit]) for c in conversations]
    walks = walk_texts(run.target, run.draft, texts, temperature=temperature, num_draft_tokens=depths)
    last = {text[0]: along[-1] for text, along in zip(texts, walks, strict=True)}
    walked = {name: (count.accepted, count.rounds) for name, count in last.items() if count is not None}
    difference, low, high = paired_difference_interval(measured, walked)
    return {
        "run": run.folder.name,
        "temperature": f"{temperature:g}",
        "num_draft_tokens": depths,
        "max_new_tokens": limit,
        "prompts": len(conversations),
        "rounds": sum(rounds for _, rounds in measured.values()),
        "measured_tau": f"{_tau(measured):.4f}",
        "walk_tau": f"{_tau(walked):.4f}",
        "difference": f"{difference:+.4f}",
        "low_99": f"{low:+.4f}",
        "high_99": f"{high:+.4f}",
        "half_width": f"{(high - low) / 2:.4f}",
        "decoding_seconds": f"{seconds:.0f}",
    }


def _tau(counts: dict[str, tuple[float, float]]) -> float:
    return 1 + sum(accepted for accepted, _ in counts.values()) / sum(rounds for _, rounds in counts.values())


if __name__ == "__main__":
    main()
