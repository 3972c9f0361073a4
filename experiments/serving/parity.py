"""Is the acceptance that vLLM measures the one that lkspec measures?

Exports a run, lets vLLM answer the same prompts with the exported draft, and compares: at T = 0 texts and accepted
tokens per position, which must be equal; at T = 1, where both sample, the difference in tau with its interval. One
request at a time on both sides. Besides, q of the exported weights, read back, against the run's on every prompt.

    python experiments/serving/parity.py --run latest --formats vllm speculators --num-draft-tokens 3 7

Rows are added to the table, so that several runs can share one.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from lkspec.app.application import quiet_libraries
from lkspec.app.load import TrainedRun, load_run
from lkspec.benchmarks.base import BenchmarkPrompt
from lkspec.benchmarks.mini import SUITES, Mini
from lkspec.decoding.chain import ChainDecoder, Completion, Request
from lkspec.decoding.sampling import Sampling
from lkspec.engines.vllm_engine import VllmEngine
from lkspec.export.base import WriteOptions
from lkspec.export.reading import Pretrained
from lkspec.export.verify import RealText, largest_q_difference
from lkspec.export.writing import layout_for, write_export
from lkspec.measure.metrics import PromptRounds, acceptance_metrics, group_counts, paired_difference_interval
from lkspec.runs.find import find_run

Q_TOLERANCE = 1e-4

Answers = Mapping[str, Completion]  # by prompt


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
    prompts = {
        f"{suite}/{prompt.id}": prompt
        for suite in SUITES
        for prompt in Mini(suite=suite).prompts(options.num_prompts // len(SUITES))
    }
    print(f"{run.folder.path.name}: {len(prompts)} prompts x {options.max_new_tokens} tokens")
    for name in options.formats:
        compare_format(run, name, prompts, options)


def compare_format(
    run: TrainedRun, name: str, prompts: Mapping[str, BenchmarkPrompt], options: argparse.Namespace
) -> None:
    """One export: its q, and its decoding at every K and temperature."""
    layout = layout_for(name, run.draft)
    assert layout.vllm is not None
    requests = [first_turn(run, prompt_id, prompt, options.max_new_tokens) for prompt_id, prompt in prompts.items()]
    assert run.target.source is not None
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "export"
        largest_k = max(options.num_draft_tokens)
        write = WriteOptions(num_draft_tokens=largest_k)
        export = write_export(run.draft, run.target, out, layout=layout, options=write)
        print("\n".join(export.checks), flush=True)
        q_difference = compare_q(run, out, prompts.values(), largest_k)
        engine = VllmEngine(python=options.python, log=str(options.out.with_suffix(".log")))
        engine.serve(run.target.source, {**layout.vllm, "model": str(out)}, run.target.eos_ids)
        try:
            for num_draft_tokens in options.num_draft_tokens:
                for temperature in options.temperatures:
                    compared = compare(run, engine, num_draft_tokens, temperature, requests)
                    facts = {"run": run.folder.path.name, "format": name, "draft_vocabulary": run.draft.vocab.size}
                    row = {**facts, **compared, "largest_q_difference": f"{q_difference:.1e}", "vllm": engine.version}
                    print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
                    add_row(options.out, row)
        finally:
            engine.close()


def first_turn(run: TrainedRun, prompt_id: str, prompt: BenchmarkPrompt, max_new_tokens: int) -> Request:
    """A prompt's first turn, as the target's chat template puts it."""
    messages = [{"role": "user", "content": prompt.turns[0]}]
    return Request(prompt_id, 0, run.target.prompt_ids(messages), max_new_tokens)


def compare_q(run: TrainedRun, out: Path, prompts: Iterable[BenchmarkPrompt], num_draft_tokens: int) -> float:
    """The largest |q - q'| between the run and its export, over all prompts."""
    again = Pretrained.open(str(out)).build(run.target)
    found = 0.0
    for prompt in prompts:
        text = RealText.answered_by(run.target, prompt=prompt, num_draft_tokens=num_draft_tokens)
        difference = largest_q_difference(run.draft, again, text, num_draft_tokens=num_draft_tokens)
        if not difference <= Q_TOLERANCE:
            raise SystemExit(f"q of the export differs by {difference:.1e} on {prompt.id}, allowed {Q_TOLERANCE:.0e}")
        found = max(found, difference)
    return found


def compare(
    run: TrainedRun, engine: VllmEngine, num_draft_tokens: int, temperature: float, requests: list[Request]
) -> dict[str, object]:
    """Both sides at one setting."""
    sampling = Sampling(temperature)
    theirs = by_prompt(list(engine.decoder(sampling, num_draft_tokens=num_draft_tokens, seed=0).run(requests)))
    chain = ChainDecoder(
        run.target, run.draft, sampling=sampling, num_draft_tokens=num_draft_tokens, batch_size=1, seed=0
    )
    ours = by_prompt(list(chain.run(requests)))
    metrics = [acceptance_metrics(rounds(side), num_draft_tokens=num_draft_tokens) for side in (ours, theirs)]
    difference, low, high = paired_difference_interval(group_counts(rounds(theirs)), group_counts(rounds(ours)))
    differing = [name for name, c in ours.items() if theirs[name].tokens != c.tokens]
    if temperature == 0:
        print_differences(ours, theirs, differing)
    return {
        "K": num_draft_tokens,
        "T": temperature,
        "prompts": len(requests),
        "tokens": sum(len(c.tokens) for c in ours.values()),
        "texts_equal": len(requests) - len(differing),
        "counts_equal": sum(accepted_counts(theirs[name]) == accepted_counts(c) for name, c in ours.items()),
        "rounds_lkspec": metrics[0].num_rounds,
        "rounds_vllm": metrics[1].num_rounds,
        "tau_lkspec": f"{metrics[0].tau:.4f}",
        "tau_vllm": f"{metrics[1].tau:.4f}",
        "difference": f"{difference:+.4f}",
        "low_99": f"{low:+.4f}",
        "high_99": f"{high:+.4f}",
        "per_position_lkspec": shares(metrics[0].acceptance_per_position),
        "per_position_vllm": shares(metrics[1].acceptance_per_position),
    }


def by_prompt(completions: Sequence[Completion]) -> Answers:
    return {completion.request.prompt_id: completion for completion in completions}


def rounds(answers: Answers) -> list[PromptRounds]:
    return [PromptRounds(name, name, c.rounds, len(c.tokens)) for name, c in answers.items()]


def accepted_counts(completion: Completion) -> list[int]:
    """Accepted tokens of each round, in no order: an engine counts rounds, it does not place them."""
    return sorted(round.accepted for round in completion.rounds)


def shares(values: Sequence[float]) -> str:
    return " ".join(f"{share:.4f}" for share in values)


def print_differences(ours: Answers, theirs: Answers, names: Sequence[str]) -> None:
    """Where greedy texts part."""
    for name in names:
        pair = ours[name].tokens, theirs[name].tokens
        at = next((i for i, (a, b) in enumerate(zip(*pair, strict=False)) if a != b), min(map(len, pair)))
        print(f"  {name}: token {at} is {pair[0][at : at + 1]} here, {pair[1][at : at + 1]} in vLLM")


def add_row(path: Path, row: Mapping[str, object]) -> None:
    fresh = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, row.keys(), lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    main()
