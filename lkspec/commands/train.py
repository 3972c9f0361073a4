"""``lkspec train``: composes draft, target, data and objective, trains, measures, and leaves a run folder."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig

from lkspec.app import sweeps
from lkspec.app.application import entry_point, flat_settings, instantiate, resolved
from lkspec.app.build import build_benchmarks, build_draft, build_vocab, open_data, run_facts
from lkspec.app.job import SECONDS, Identity, code_of
from lkspec.app.load import draft_weights, init_draft, initial_weights, read_checkpoint
from lkspec.app.start import Opened, opened_run, planned
from lkspec.data.captured import CapturedStates
from lkspec.data.datamodule import SpeculatorDataModule
from lkspec.drafts.base import Draft, UnrollOptions
from lkspec.losses.fused.head_summary import head_summary
from lkspec.measure.benchmark import Measurement
from lkspec.measure.suite import Suite, SuiteOptions, draw_run
from lkspec.reporting.terminal import console, facts
from lkspec.runs.folder import RunFolder
from lkspec.targets.base import Target
from lkspec.targets.memory import RememberedStates
from lkspec.training.module import SpeculatorModule
from lkspec.types import Batch, TargetStates
from lkspec.vocab import DraftVocab

_BATCHING = ("seed", "max_tokens", "accumulate", "pack", "num_workers", "limit_conversations")  # keys of data


@entry_point("train")
def main(config: DictConfig) -> dict[str, float] | None:
    """Runs one training; returns the final acceptance lengths (for sweepers)."""
    if sweeps.is_job():
        sweeps.refuse_parallel_jobs(config.trainer.devices)
    if config.plan:
        sweeps.plan(planned(config))
        return None
    with opened_run(config) as run:
        return None if run is None else _train(run)


def _train(run: Opened) -> dict[str, float]:
    start = time.monotonic()
    folder, config, checkpoint = run.folder, run.config, run.checkpoint
    seed_everything(config.seed, workers=True, verbose=False)
    torch.set_float32_matmul_precision(config.matmul_precision)
    unroll_options = UnrollOptions(**resolved(config.unroll))
    target, data = _target_and_data(config)
    draft = _build_draft(config, target, data, folder if checkpoint is not None else None)
    draft.unroll_options = unroll_options
    info = {
        "config": resolved(config),
        "target_fingerprint": target.fingerprint,
        "data_fingerprint": data.fingerprint,
    }
    if checkpoint is None and rank_zero_only.rank == 0:
        folder.write_identity(Identity(target.fingerprint, data.fingerprint, code_of(resolved(config))).as_dict())
    module = _build_module(config, draft, target, _target_states(config, draft, target, data), info)
    facts = run_facts(config, folder, target, info)
    suite = Suite(target, build_benchmarks(config.benchmark), SuiteOptions(**resolved(config.evaluation)), facts)
    trainer = _build_trainer(config, suite, module)
    _banner(folder, config, module, target, data)
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    # Lightning's word for "with the optimiser and loop states"; the file itself loads under torch's weights_only=True.
    trainer.save_checkpoint(folder.checkpoints_dir / f"step={trainer.global_step}.ckpt", weights_only=False)
    _validate_the_end(trainer, module, data)
    return _finish(trainer, folder, suite, module, seconds=None if checkpoint else time.monotonic() - start)


def _validate_the_end(trainer: Trainer, module: SpeculatorModule, data: SpeculatorDataModule) -> None:
    """Validates where training ended, if fit did not: it does not when steps or time run out within an epoch."""
    if len(data.validation_set) == 0 or trainer.limit_val_batches == 0 or module.validated_step == trainer.global_step:
        return
    logged = dict(trainer.logged_metrics)
    trainer.validate(module, datamodule=data, verbose=False)
    trainer.logged_metrics.update({key: value for key, value in logged.items() if key not in trainer.logged_metrics})


def _target_and_data(config: DictConfig) -> tuple[Target, SpeculatorDataModule]:
    """The target, and the data tokenised for it; jobs of a sweep have them in common."""
    target: Target = sweeps.shared("target", resolved(config.target), lambda: instantiate(config.target))
    return target, open_data(config, target, share=partial(sweeps.shared, "data", _data_key(config)))


def _data_key(config: DictConfig) -> list[dict[str, Any]]:
    """What tokenised data depends on: not how it is batched."""
    settings = {key: value for key, value in resolved(config.data).items() if key not in _BATCHING}
    return [resolved(config.target), settings]


def _build_draft(config: DictConfig, target: Target, data: SpeculatorDataModule, resumed: RunFolder | None) -> Draft:
    """The draft to train. A resumed run has its vocabulary already; one with ``init_from`` takes over the source's."""
    if resumed is not None:
        ids = draft_weights(read_checkpoint(resumed))["vocab.ids"]
        return build_draft(config.draft, target, DraftVocab(ids, target.vocab_size))
    source = config.draft.get("init_from")
    initial = None if source is None else initial_weights(source, Path(config.run_root), target)
    if initial is None:
        return build_draft(config.draft, target, build_vocab(config, target, data))
    vocab = initial.vocab if config.vocab.size == "auto" else build_vocab(config, target, data)
    draft = build_draft(config.draft, target, vocab)
    init_draft(draft, initial, config.draft, target)
    return draft


def _target_states(
    config: DictConfig, draft: Draft, target: Target, data: SpeculatorDataModule
) -> Callable[[Batch], TargetStates]:
    """Where the target's states come from: the target itself or a capture; either is remembered on request."""
    states: Callable[[Batch], TargetStates] = target.states
    if config.states_dir is not None:
        states = captured = CapturedStates(Path(config.states_dir), target)
        captured.check(data.train_set, data.validation_set)
    fills_alone = target.device.type == "cpu" or config.states_dir is not None
    return sweeps.shared(
        "states",
        [_data_key(config), config.states_dir, config.states_memory_gb, draft.reads_aux, draft.vocab.is_full],
        lambda: RememberedStates(
            states,
            config.states_memory_gb,
            company=None if fills_alone else data.encoded.company(),
            summarise=None if draft.vocab.is_full else partial(head_summary, target.head),
            with_aux=draft.reads_aux,
        ),
    )


def _build_module(
    config: DictConfig,
    draft: Draft,
    target: Target,
    target_states: Callable[[Batch], TargetStates],
    info: dict[str, Any],
) -> SpeculatorModule:
    return SpeculatorModule(
        draft,
        instantiate(config.loss),
        target_states=target_states,
        target_head=target.head,
        optimizer=instantiate(config.optimizer),
        scheduler=instantiate(config.scheduler),
        gamma=config.loss_options.gamma,
        gradient_clip=config.gradient_clip,
        chunk_size=config.loss_options.chunk_size,
        checkpoint_info=info,
    )


def _build_trainer(config: DictConfig, suite: Suite, module: SpeculatorModule) -> Trainer:
    if str(config.trainer.precision).startswith("16"):
        raise ValueError("trainer.precision: float16 would need loss scaling; use bf16-mixed or 32-true")

    def evaluate(stage: str, step: int) -> list[Measurement]:
        return suite.run(module.draft, stage=stage, step=step, supervised_tokens=module.num_supervised_seen)

    callbacks = []
    for entry in filter(None, config.callbacks.values()):  # null switches one off
        needs_evaluation = entry["_target_"].endswith(".AcceptanceLength")
        if needs_evaluation:
            suite.check(module.draft)
        callbacks.append(instantiate(entry, evaluate) if needs_evaluation else instantiate(entry))
    loggers = [instantiate(entry) for entry in config.logger.values()]
    try:
        trainer: Trainer = instantiate(config.trainer, callbacks=callbacks, logger=loggers)
    except MisconfigurationException as error:
        raise ValueError(f"trainer: {error}") from error
    return trainer


@rank_zero_only
def _banner(
    folder: RunFolder, config: DictConfig, module: SpeculatorModule, target: Target, data: SpeculatorDataModule
) -> None:
    draft, counts = module.draft, data.token_counts(target.vocab_size)
    share = draft.num_trainable / target.num_parameters
    lines = {
        "run": str(folder.path),
        "draft": f"{config.names.draft}, {draft.num_depths} depths: {draft.num_trainable:,} trainable parameters "
        f"({share:.1%} of the target), {draft.num_frozen:,} frozen",
        "served by": draft.served_by,
        "target": f"{target.name}: {target.num_parameters:,} parameters, {target.dtype}, {target.device}, "
        f"{target.attn_implementation} attention, auxiliary layers {', '.join(map(str, target.aux_layer_ids))}",
        "objective": module.objective.describe() + (f", eta is {config.eta_source}" if config.eta_source else ""),
        "data": f"{data.num_conversations:,} conversations, {data.num_supervised_tokens:,} supervised tokens",
        "vocabulary": f"{draft.vocab.size:,} of {draft.vocab.target_size:,} tokens, "
        f"covers {draft.vocab.coverage(counts):.2%} of the supervised ones",
    }
    facts(lines)


def _finish(
    trainer: Trainer, folder: RunFolder, suite: Suite, module: SpeculatorModule, *, seconds: float | None
) -> dict[str, float]:
    """Saves final metrics, the hyper-parameters tab and the figures; returns the acceptance lengths.

    ``seconds`` is the wall time of a run that was not interrupted: plans of later sweeps are estimated from it.
    """
    final = {row.name: row.tau for row in suite.last_rows}
    if trainer.is_global_zero:
        if module.walk_rows:
            folder.write_walk(module.walk_rows)
        logged = {name: float(value) for name, value in trainer.logged_metrics.items()}
        logged |= {} if seconds is None else {SECONDS: seconds}
        folder.write_metrics({**logged, **{f"eval/{name}/acceptance_length": tau for name, tau in final.items()}})
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                metrics = {f"hparams/{name}": tau for name, tau in final.items()}
                logger.log_hyperparams(flat_settings(folder.config), metrics)
                logger.save()
        draw_run(folder)
        console.print(f"checkpoints, TensorBoard logs, figures and results: {folder.path}", soft_wrap=True)
    return final


if __name__ == "__main__":
    main()
