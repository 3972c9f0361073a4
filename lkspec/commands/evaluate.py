"""``lkspec evaluate``: measures a finished run by real speculative decoding, or along answers that are there."""

from __future__ import annotations

from contextlib import nullcontext

from omegaconf import DictConfig

from lkspec.app.application import entry_point, resolved
from lkspec.app.build import build_benchmarks, run_facts
from lkspec.app.engine import serving_engine
from lkspec.app.load import TrainedRun, open_run
from lkspec.commands.walk import walk_run
from lkspec.measure.suite import Suite, SuiteOptions, listed
from lkspec.measure.throughput import ThroughputOptions, comparable, measure_throughput, print_throughput
from lkspec.reporting.run_figures import draw_run
from lkspec.reporting.terminal import console


@entry_point("evaluate", fixed_by_run=True)
def main(config: DictConfig) -> None:
    """Writes results rows and rounds, the walk, or the throughput of an engine, into the run's folder."""
    if config.answers is not None:
        _walk(config)
    elif config.get("throughput") is None:
        _acceptance(config)
    else:
        _throughput(config)


def _acceptance(config: DictConfig) -> None:
    options = resolved(config.evaluation)
    options |= {key: resolved(config)[key] for key in ("num_draft_tokens", "temperatures", "batch_size", "sharpness")}
    suite_options = SuiteOptions(**options)
    if config.get("engine") is not None:
        _refuse_sharpness(config)
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
    walk_run(
        open_run(config),
        listed(options["answers"]),
        num_draft_tokens=max(listed(options["num_draft_tokens"])),
        sharpness=[float(power) for power in listed(options["sharpness"])],
    )


def _refuse_sharpness(config: DictConfig) -> None:
    if listed(resolved(config)["sharpness"]) != [1]:
        raise ValueError(
            "sharpness: an engine serves q as it is exported; evaluate what `lkspec export sharpness=...` wrote, as "
            "draft=pretrained draft.path=... target=..."
        )


def _throughput(config: DictConfig) -> None:
    _refuse_sharpness(config)
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
