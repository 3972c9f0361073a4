"""``lkspec evaluate``: measures a finished run by real speculative decoding, or along answers that are there."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from lkspec.acceptance import walk_answers
from lkspec.assemble import TrainedRun, open_run
from lkspec.builders import build_benchmarks, run_facts
from lkspec.config import entry_point, resolved
from lkspec.data.dataset import EncodedStore
from lkspec.data.tokenised import read_tokenised
from lkspec.serving import serving_engine
from lkspec.suite import Suite, SuiteOptions, draw_run, listed
from lkspec.targets.base import Target
from lkspec.throughput import ThroughputOptions, comparable, measure_throughput, print_throughput
from lkspec.walk_rows import WalkRow

console = Console()


@entry_point("evaluate", fixed_by_run=True)
def main(config: DictConfig) -> None:
    """Writes results rows and rounds, the walk, or the throughput of an engine, into the run's folder."""
    if config.answers is not None:
        _walk(config)
    elif config.sharpness != 1:
        raise ValueError(
            "sharpness goes with answers=...; to decode with it, evaluate what lkspec export sharpness=... wrote"
        )
    elif config.get("throughput") is None:
        _acceptance(config)
    else:
        _throughput(config)


def _acceptance(config: DictConfig) -> None:
    options = resolved(config.evaluation)
    options |= {key: resolved(config)[key] for key in ("num_draft_tokens", "temperatures", "batch_size")}
    suite_options = SuiteOptions(**options)
    benchmarks = build_benchmarks(config.benchmark)
    run = open_run(config)
    depths = max(setting.num_draft_tokens for setting in suite_options.settings())
    serving = nullcontext() if config.get("engine") is None else serving_engine(config.engine, run, depths)
    with serving as engine:
        facts = run_facts(run.config, run.folder, run.target, run.info)
        suite = Suite(run.target, benchmarks, suite_options, facts, engine)
        stage = "without" if run.is_pretrained else "after"
        suite.run(run.draft, stage=stage, step=run.step, supervised_tokens=run.info["num_supervised_seen"])
    draw_run(run.folder)
    console.print(f"results: {run.folder.results_file}", soft_wrap=True)


def _walk(config: DictConfig) -> None:
    if config.get("engine") is not None or config.get("throughput") is not None:
        raise ValueError("answers are walked along without any engine: leave out engine and throughput")
    options = resolved(config)
    powers = [float(power) for power in listed(options["sharpness"])]
    if not powers or not all(0 < power < math.inf for power in powers):
        raise ValueError(f"sharpness: expected positive numbers, got {options['sharpness']}")
    run = open_run(config)
    depths = run.draft.num_depths
    answers = _answers(listed(options["answers"]), run.target)
    walked = walk_answers(run.target, run.draft, answers, num_draft_tokens=depths, steps=run.step, sharpness=powers)
    if powers == [1.0]:
        _keep(run, walked[1.0])
    else:
        _print_sharpness(walked, num_draft_tokens=depths)


def _keep(run: TrainedRun, rows: Sequence[WalkRow]) -> None:
    """Adds a walk to the run's own, and shows all of it."""
    from lkspec.reporting.layout import Layout  # pandas and all: decoding can do without
    from lkspec.reporting.renderers import terminal
    from lkspec.reporting.tables import build_table

    run.folder.add_walk(rows)
    layout = Layout(rows=["draft", "objective"], columns=["temperature"], value="walk")
    terminal.show(build_table([run.folder], layout), console)


def _print_sharpness(walked: Mapping[float, Sequence[WalkRow]], *, num_draft_tokens: int) -> None:
    """tau of the walk with q^s by temperature, the largest of each temperature in bold."""
    temperatures = sorted({row.temperature for rows in walked.values() for row in rows})
    taus = {
        (power, temperature): _tau([row for row in rows if row.temperature == temperature], num_draft_tokens)
        for power, rows in walked.items()
        for temperature in temperatures
    }
    table = Table()
    table.add_column("s", justify="right")
    for temperature in temperatures:
        table.add_column(f"T = {temperature:g}", justify="right")
    for power in sorted(walked):
        best = [taus[power, t] == max(taus[other, t] for other in walked) for t in temperatures]
        cells = [f"{taus[power, t]:.3f}" for t in temperatures]
        table.add_row(f"{power:g}", *(f"[bold]{c}[/bold]" if b else c for c, b in zip(cells, best, strict=True)))
    console.print(f"walk with q^s, renormalised, in place of q, K = {num_draft_tokens}", highlight=False)
    console.print(table)
    console.print("nothing was stored; lkspec export sharpness=s writes such a draft", highlight=False)


def _tau(rows: Sequence[WalkRow], num_draft_tokens: int) -> float:
    whole = [row for row in rows if row.depth == num_draft_tokens]
    rounds = sum(row.rounds for row in whole)
    return 1 + sum(row.accepted for row in whole) / rounds if rounds > 0 else math.nan


def _answers(paths: Sequence[str], target: Target) -> EncodedStore:
    """Conversations of all files, each with the temperature that it was written at."""
    answers = EncodedStore()
    for path in paths:
        read = read_tokenised(path, target.tokenizer, max_length=target.max_positions, eos_ids=target.eos_ids)
        for index in range(len(read.store)):
            one = read.store[index]
            if one.temperature is None:
                raise ValueError(
                    f"answers={path}: {one.id!r} does not say at which temperature the target wrote it; `lkspec "
                    "generate` writes the field temperature into every row"
                )
            answers.append(one)
    return answers


def _throughput(config: DictConfig) -> None:
    options = ThroughputOptions(**resolved(config.throughput), seed=config.evaluation.seed)
    if config.get("engine") is None:
        raise ValueError("throughput measures a serving engine: say engine=vllm, or engine=server base_url=...")
    benchmarks = build_benchmarks(config.benchmark)
    run: TrainedRun = open_run(config)
    options.check(run.draft)
    with serving_engine(config.engine, run, max(1, *options.depths)) as engine:
        facts = run_facts(run.config, run.folder, run.target, run.info)
        newest = measure_throughput(engine, run.target, benchmarks, options, facts, step=run.step)
    run.folder.write_throughput(newest)
    print_throughput(comparable(run.folder.read_throughput(), newest))
    console.print(f"throughput: {run.folder.throughput_file}", soft_wrap=True)


if __name__ == "__main__":
    main()
