"""``lkspec throughput``: an engine's tokens per second by concurrency and K, with a run's draft."""

from __future__ import annotations

from omegaconf import DictConfig

from lkspec.app.application import resolved
from lkspec.app.build import build_benchmarks, run_facts
from lkspec.app.engine import serving_engine
from lkspec.app.load import open_run
from lkspec.measure.throughput import ThroughputOptions, measure_throughput
from lkspec.reporting import terminal
from lkspec.reporting.measured import comparable, print_throughput

_OPTIONS = ("concurrency", "num_draft_tokens", "num_requests", "max_new_tokens", "temperature", "seed")


def main(config: DictConfig) -> None:
    """Writes throughput rows into the run's folder."""
    plain = resolved(config)
    options = ThroughputOptions(**{key: plain[key] for key in _OPTIONS})
    benchmarks = build_benchmarks(config.benchmark)
    run = open_run(config)
    options.check(run.draft)
    with serving_engine(config.engine, run, max(1, *options.depths)) as engine:
        facts = run_facts(run.config, run.folder, run.target, run.info)
        newest = measure_throughput(
            engine, run.target, benchmarks, options, facts, step=run.step, show=terminal.console.status
        )
    run.folder.write_throughput(newest)
    print_throughput(comparable(run.folder.read_throughput(), newest))
    terminal.say(f"throughput: {run.folder.throughput_file}")
