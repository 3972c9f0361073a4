"""``lkspec evaluate``: measures a finished run by real speculative decoding."""

from __future__ import annotations

from contextlib import nullcontext

from omegaconf import DictConfig

from lkspec.app.application import resolved
from lkspec.app.build import build_benchmarks, run_facts
from lkspec.app.engine import serving_engine
from lkspec.app.evaluation import Evaluation
from lkspec.app.load import open_run
from lkspec.measure.evaluation import EvaluationOptions, listed
from lkspec.reporting.run_figures import draw_run
from lkspec.reporting.terminal import say

_OPTIONS = ("temperatures", "num_draft_tokens", "top_k", "top_p", "draft_filter", "sharpness", "batch_size", "seed")


def main(config: DictConfig) -> None:
    """Writes results rows and rounds into the run's folder."""
    plain = resolved(config)
    options = EvaluationOptions(**{key: plain[key] for key in _OPTIONS})
    if config.get("engine") is not None and listed(plain["sharpness"]) != [1]:
        raise ValueError(
            "sharpness: an engine serves q as it is exported; evaluate what `lkspec export sharpness=...` wrote, as "
            "draft=pretrained draft.path=... target=..."
        )
    benchmarks = build_benchmarks(config.benchmark)
    run = open_run(config)
    depths = max(setting.num_draft_tokens for setting in options.settings())
    serving = nullcontext() if config.get("engine") is None else serving_engine(config.engine, run, depths)
    with serving as engine:
        facts = run_facts(run.config, run.folder, run.target, run.info)
        evaluation = Evaluation(run.target, benchmarks, options, facts, engine)
        stage = "without" if run.is_pretrained else "after"
        evaluation.run(run.draft, stage=stage, step=run.step, supervised_tokens=run.info["num_supervised_seen"])
    draw_run(run.folder)
    renewed = {row.row_key for row in evaluation.last_rows}
    rows = [row for row in run.folder.read_results() if row.engine == "lkspec" and row.steps == run.step]
    if engine is None and all(row.row_key in renewed for row in rows):  # else some are still of the code before
        run.note_measuring_code()
    say(f"results: {run.folder.results_file}")
