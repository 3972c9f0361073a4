"""Is the acceptance that vLLM measures the one that lkspec measures?

Exports a run, lets vLLM answer the same prompts with the exported draft, and compares: at T = 0 texts and accepted
tokens per position, which must be equal; at T = 1, where both sample, the difference in tau with its interval. One
request at a time on both sides.

    python experiments/serving/parity.py --run latest
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lkspec.assemble import TrainedRun, load_run
from lkspec.benchmarks.mini import SUITES, Mini
from lkspec.config import quiet_libraries
from lkspec.decoding.chain import ChainDecoder, Completion, Request
from lkspec.decoding.sampling import Sampling
from lkspec.engines.vllm_engine import VllmEngine
from lkspec.export.base import WriteOptions
from lkspec.export.writing import layout_for, write_export
from lkspec.metrics import PromptRounds, acceptance_metrics, group_counts, paired_difference_interval
from lkspec.results import find_run


@dataclass(frozen=True)
class Side:
    """One engine's answers, by prompt."""

    completions: dict[str, Completion]

    @classmethod
    def of(cls, completions: Sequence[Completion]) -> Side:
        return cls({completion.request.prompt_id: completion for completion in completions})

    def rounds(self) -> list[PromptRounds]:
        return [PromptRounds(name, name, c.rounds, len(c.tokens)) for name, c in self.completions.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="latest")
    parser.add_argument("--run-root", type=Path, default=Path("runs"))
    parser.add_argument("--python", default=".serve-venv/bin/python", help="interpreter of the serving environment")
    parser.add_argument("--formats", nargs="+", default=["vllm"], help="vllm, speculators, medusa")
    parser.add_argument("--num-draft-tokens", type=int, nargs="+", default=[3, 7])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--num-prompts", type=int, default=42)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("parity.csv"))
    options = parser.parse_args()
    quiet_libraries()
    run = load_run(find_run(options.run, options.run_root))
    requests = first_turns(run, options.num_prompts, options.max_new_tokens)
    rows: list[dict[str, object]] = []
    for name in options.formats:
        for num_draft_tokens in options.num_draft_tokens:
            rows += compare_format(run, name, num_draft_tokens, requests, options)
            write_rows(options.out, rows)


def first_turns(run: TrainedRun, num_prompts: int, max_new_tokens: int) -> list[Request]:
    """First turns of the packaged suites, as many of each."""
    requests = []
    for suite in SUITES:
        for prompt in Mini(suite=suite, num_prompts=num_prompts // len(SUITES)).prompts():
            messages = [{"role": "user", "content": prompt.turns[0]}]
            ids = run.target.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            requests.append(Request(f"{suite}/{prompt.id}", 0, tuple(ids), max_new_tokens))
    return requests


def compare_format(
    run: TrainedRun, name: str, num_draft_tokens: int, requests: list[Request], options: argparse.Namespace
) -> list[dict[str, object]]:
    """One export at one K, at every temperature."""
    words = {"method": "medusa"} if name == "medusa" else {"method": "eagle3", "draft_sample_method": "probabilistic"}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "export"
        write = WriteOptions(num_draft_tokens=num_draft_tokens)
        export = write_export(run.draft, run.target, out, layout=layout_for(name, run.draft), options=write)
        print("\n".join(export.checks), flush=True)
        engine = VllmEngine(python=options.python, log=str(options.out.with_suffix(".log")))
        assert run.target.source is not None
        engine.serve(run.target.source, {**words, "model": str(out)}, run.target.eos_ids)
        try:
            return [
                compare(run, engine, name, num_draft_tokens, temperature, requests)
                for temperature in options.temperatures
            ]
        finally:
            engine.close()


def compare(
    run: TrainedRun, engine: VllmEngine, name: str, num_draft_tokens: int, temperature: float, requests: list[Request]
) -> dict[str, object]:
    """Both sides at one setting."""
    sampling = Sampling(temperature)
    theirs = Side.of(list(engine.decoder(sampling, num_draft_tokens=num_draft_tokens, seed=0).run(requests)))
    chain = ChainDecoder(
        run.target, run.draft, sampling=sampling, num_draft_tokens=num_draft_tokens, batch_size=1, seed=0
    )
    ours = Side.of(list(chain.run(requests)))
    metrics = [acceptance_metrics(side.rounds(), num_draft_tokens=num_draft_tokens) for side in (ours, theirs)]
    difference, low, high = paired_difference_interval(group_counts(theirs.rounds()), group_counts(ours.rounds()))
    differing = [name for name, c in ours.completions.items() if theirs.completions[name].tokens != c.tokens]
    row: dict[str, object] = {
        "format": name,
        "K": num_draft_tokens,
        "T": temperature,
        "prompts": len(requests),
        "tokens": sum(len(c.tokens) for c in ours.completions.values()),
        "texts_equal": len(requests) - len(differing),
        "rounds_lkspec": metrics[0].num_rounds,
        "rounds_vllm": metrics[1].num_rounds,
        "tau_lkspec": round(metrics[0].tau, 4),
        "tau_vllm": round(metrics[1].tau, 4),
        "difference": round(difference, 4),
        "low_99": round(low, 4),
        "high_99": round(high, 4),
        "per_position_lkspec": " ".join(f"{share:.4f}" for share in metrics[0].acceptance_per_position),
        "per_position_vllm": " ".join(f"{share:.4f}" for share in metrics[1].acceptance_per_position),
        "vllm": engine.version,
    }
    print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    if temperature == 0 and differing:
        print_differences(ours, theirs, differing)
    return row


def print_differences(ours: Side, theirs: Side, names: Sequence[str]) -> None:
    """Where greedy texts part."""
    for name in names:
        pair = ours.completions[name].tokens, theirs.completions[name].tokens
        at = next(i for i, (a, b) in enumerate(zip(*pair, strict=False)) if a != b)
        print(f"  {name}: token {at} is {pair[0][at]} here, {pair[1][at]} in vLLM")


def write_rows(path: Path, rows: list[dict[str, object]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
