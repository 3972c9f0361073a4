"""``lkspec evaluate``: measures a finished run on benchmarks by real speculative decoding."""

from __future__ import annotations

from contextlib import nullcontext

from omegaconf import DictConfig
from rich.console import Console

from lkspec.assemble import open_run
from lkspec.builders import build_benchmarks, run_facts
from lkspec.config import entry_point, resolved
from lkspec.serving import served_by_vllm
from lkspec.suite import Suite, SuiteOptions, draw_run

console = Console()


@entry_point("evaluate", fixed_by_run=True)
def main(config: DictConfig) -> None:
    """Writes results rows and rounds into the run's folder."""
    options = resolved(config.evaluation)
    options |= {key: resolved(config)[key] for key in ("num_draft_tokens", "temperatures", "batch_size")}
    suite_options = SuiteOptions(**options)
    benchmarks = build_benchmarks(config.benchmark)
    run = open_run(config)
    depths = max(setting.num_draft_tokens for setting in suite_options.settings())
    serving = nullcontext() if config.get("engine") is None else served_by_vllm(config.engine, run, depths)
    with serving as engine:
        facts = run_facts(run.config, run.folder, run.target, run.info)
        suite = Suite(run.target, benchmarks, suite_options, facts, engine)
        stage = "without" if run.is_pretrained else "after"
        suite.run(run.draft, stage=stage, step=run.step, supervised_tokens=run.info["num_supervised_seen"])
    draw_run(run.folder)
    console.print(f"results: {run.folder.results_file}", soft_wrap=True)


if __name__ == "__main__":
    main()
