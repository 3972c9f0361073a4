"""``lkspec train``: composes draft, target, data and objective, trains, measures, and leaves a run folder."""

from __future__ import annotations

import time

from omegaconf import DictConfig

from lkspec.app.application import resolved
from lkspec.app.build import (
    build_benchmarks,
    build_module,
    build_trainer,
    eta_source,
    run_facts,
    target_and_data,
)
from lkspec.app.evaluation import Evaluation
from lkspec.app.job import SECONDS, Job
from lkspec.app.load import draft_to_train
from lkspec.app.start import started
from lkspec.app.sweeps import Sweep, refuse_parallel_jobs
from lkspec.data.datamodule import SpeculatorDataModule
from lkspec.measure.evaluation import EvaluationOptions
from lkspec.reporting import terminal
from lkspec.reporting.run_figures import draw_run
from lkspec.runs.folder import RunFolder
from lkspec.targets.base import Target
from lkspec.training.module import SpeculatorModule
from lkspec.training.run import Trainer, fit, is_first_rank, log_hyperparameters, seed_run


def main(config: DictConfig) -> dict[str, float] | None:
    """Runs one training; returns the final acceptance lengths (for sweepers)."""
    sweep = Sweep.of(config)
    if sweep.journal is not None:
        refuse_parallel_jobs(config.trainer.devices)
    job = Job.of(config)
    if config.list_jobs:
        sweep.note(listed=(line := job.listed(sweep)))
        if sweep.journal is None:
            from lkspec.reporting.jobs import print_list  # pandas and all, which training does without

            print_list([line])
        return None
    with started(job, sweep) as ready:
        return None if ready is None else train(ready, sweep)


def train(job: Job, sweep: Sweep) -> dict[str, float]:
    """Trains a job's draft in its folder, which is made once everything is built: what is refused leaves nothing."""
    start, config = time.monotonic(), job.config
    seed_run(config.seed, config.matmul_precision)
    target, data = target_and_data(config, sweep)
    draft = draft_to_train(job, target, data)
    facts = run_facts(config, job.folder, target, {"data_fingerprint": data.fingerprint})
    options = EvaluationOptions(**resolved(config.evaluation))
    evaluation = Evaluation(target, build_benchmarks(config.benchmark), options, facts)
    module = build_module(config, draft, target, data, evaluation, sweep)
    trainer = build_trainer(config, job.folder, evaluation, draft)
    if is_first_rank():
        if job.checkpoint is None:
            folder = job.folder
            RunFolder.create(folder.path.parent, folder.name, config=job.settings, overrides=job.overrides)
            folder.write_identity(job.identity(sweep).as_dict())
        _print_facts(job, module, target, data)
    fit(trainer, module, data, resume=job.checkpoint, checkpoints=job.folder.checkpoints_dir)
    return _finish(job, trainer, evaluation, module, seconds=None if job.checkpoint else time.monotonic() - start)


def _print_facts(job: Job, module: SpeculatorModule, target: Target, data: SpeculatorDataModule) -> None:
    draft, counts, chosen = module.draft, data.token_counts(target.vocab_size), eta_source(job.config)
    share = draft.num_trainable / target.num_parameters
    terminal.facts(
        {
            "run": str(job.folder.path),
            "draft": f"{job.config.names.draft}, {draft.num_depths} depths: {draft.num_trainable:,} trainable "
            f"parameters ({share:.1%} of the target), {draft.num_frozen:,} frozen",
            "served by": draft.served_by,
            "target": f"{target.name}: {target.num_parameters:,} parameters, {target.dtype}, {target.device}, "
            f"{target.attn_implementation} attention, auxiliary layers {', '.join(map(str, target.aux_layer_ids))}",
            "objective": module.objective.describe() + (f", eta is {chosen}" if chosen else ""),
            "data": f"{len(data.train_set):,} conversations, {data.num_supervised_tokens:,} supervised tokens",
            "vocabulary": f"{draft.vocab.size:,} of {draft.vocab.target_size:,} tokens, "
            f"covers {draft.vocab.coverage(counts):.2%} of the supervised ones",
        }
    )


def _finish(
    job: Job, trainer: Trainer, evaluation: Evaluation, module: SpeculatorModule, *, seconds: float | None
) -> dict[str, float]:
    """Saves final metrics, the hyper-parameters tab and the figures; returns the acceptance lengths.

    ``seconds`` is the wall time of a run that was not interrupted: the hours of later sweeps are estimated from it.
    """
    final, folder = {row.name: row.tau for row in evaluation.last_rows}, job.folder
    if is_first_rank():
        if module.walk_rows:
            folder.write_walk(module.walk_rows)
        logged = {name: float(value) for name, value in trainer.logged_metrics.items()}
        logged |= {} if seconds is None else {SECONDS: seconds}
        folder.write_metrics({**logged, **{f"eval/{name}/acceptance_length": tau for name, tau in final.items()}})
        log_hyperparameters(trainer, job.settings, final)
        draw_run(folder)
        terminal.say(f"checkpoints, TensorBoard logs, figures and results: {folder.path}")
    return final
