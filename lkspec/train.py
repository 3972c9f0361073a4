"""``lkspec train``: composes draft, target, data and objective, trains, measures, and leaves a run folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning import Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from lkspec.assemble import draft_weights, init_draft, initial_weights, read_checkpoint
from lkspec.builders import build_benchmarks, build_draft, build_vocab, expanded_draft, run_facts
from lkspec.config import entry_point, flat_settings, instantiate, resolved
from lkspec.data.captured import CapturedStates
from lkspec.data.datamodule import SpeculatorDataModule
from lkspec.drafts.base import Draft
from lkspec.evaluation import Measurement
from lkspec.module import SpeculatorModule
from lkspec.results import RunFolder, find_run, run_name
from lkspec.suite import Suite, SuiteOptions, draw_run
from lkspec.targets.base import Target
from lkspec.targets.memory import RememberedStates
from lkspec.types import Batch, TargetStates
from lkspec.vocab import DraftVocab

# What does not change a run's result is not part of its name.
_NOT_IN_HASH = ("run_root", "run_dir", "resume", "on_existing", "logger")
_RESUMABLE_OVERRIDES = ("resume=", "run_root=", "logger=", "logger.")

console = Console()


@entry_point("train")
def main(config: DictConfig) -> dict[str, float] | None:
    """Runs one training; returns the final acceptance lengths (for sweepers)."""
    _refuse_parallel_sweep(config)
    folder, config, checkpoint = _open_run(config)
    if folder is None:
        return None
    seed_everything(config.seed, workers=True, verbose=False)
    torch.set_float32_matmul_precision(config.matmul_precision)
    target: Target = instantiate(config.target)
    data: SpeculatorDataModule = instantiate(config.data)
    data.bind(target.tokenizer, eos_ids=target.eos_ids, max_positions=target.max_positions)
    data.setup()
    draft = _build_draft(config, target, data, folder if checkpoint is not None else None)
    info = {
        "config": resolved(config),
        "target_fingerprint": target.fingerprint,
        "data_fingerprint": data.fingerprint,
    }
    module = _build_module(config, draft, target, _target_states(config, target, data), info)
    facts = run_facts(config, folder, target, info)
    suite = Suite(target, build_benchmarks(config.benchmark), SuiteOptions(**resolved(config.evaluation)), facts)
    trainer = _build_trainer(config, suite, module)
    _banner(folder, config, module, target, data)
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    # Lightning's word for "with the optimiser and loop states"; the file itself loads under torch's weights_only=True.
    trainer.save_checkpoint(folder.checkpoints_dir / f"step={trainer.global_step}.ckpt", weights_only=False)
    return _finish(trainer, folder, suite, module)


def _refuse_parallel_sweep(config: DictConfig) -> None:
    """Every rank of a multi-device run starts the whole program again, a sweep included."""
    if HydraConfig.get().mode == RunMode.MULTIRUN and config.trainer.devices not in (1, "1", [0]):
        raise ValueError(
            f"a multirun with trainer.devices={config.trainer.devices} would start the whole sweep again in each "
            "process: sweep with trainer.devices=1, or start the runs one by one"
        )


def _open_run(config: DictConfig) -> tuple[RunFolder | None, DictConfig, Path | None]:
    """The run's folder, its configuration and the checkpoint to go on from; no folder when there is nothing to do."""
    root = Path(config.run_root)
    if config.resume is not None:
        return _resumed(find_run(config.resume, root), config, list(HydraConfig.get().overrides.task))
    if config.on_existing not in ("error", "replace", "skip"):
        raise ValueError(f"on_existing: expected error, replace or skip, got {config.on_existing!r}")
    if "path" in config.draft and "_target_" not in config.draft:
        config.draft = expanded_draft(config.draft)
        config.names.draft = Path(config.draft.init_from).name
    names = config.names
    hashed = resolved(config)
    # Captured states are rounded, so that a run with them is another run; the folder they lie in changes nothing.
    if hashed.pop("states_dir") is not None:
        hashed["captured_states"] = True
    name = run_name(names.draft, names.loss, names.target, seed=config.seed, config=hashed, ignore=_NOT_IN_HASH)
    folder = RunFolder(root / name)
    config.eta_source = _eta_source(config)
    config.run_dir = str(folder.path)
    config = OmegaConf.create(resolved(config))
    if rank_zero_only.rank != 0:
        return folder, config, None
    if folder.is_finished and config.on_existing == "skip":
        console.print(f"{folder.path} is there already: skipped (on_existing=skip)")
        return None, config, None
    if folder.has_results and config.on_existing == "replace":
        folder.remove()
    overrides = list(HydraConfig.get().overrides.task)
    return RunFolder.create(root, name, config=resolved(config), overrides=overrides), config, None


def _eta_source(config: DictConfig) -> str | None:
    """Who chose the adaptive objective's eta; None for objectives without one."""
    if "eta" not in config.loss:
        return None
    if OmegaConf.is_interpolation(config.loss, "eta"):
        return f"the paper's for {config.names.draft}"
    return "set by the configuration"


def _resumed(folder: RunFolder, given: DictConfig, overrides: list[str]) -> tuple[RunFolder, DictConfig, Path]:
    refused = [override for override in overrides if not override.startswith(_RESUMABLE_OVERRIDES)]
    if refused:
        raise ValueError(
            f"resume continues {folder.name} exactly as it was configured; leave out {', '.join(refused)} "
            "or start a new run (draft.init_from is not needed to resume)"
        )
    checkpoint = folder.last_checkpoint
    if checkpoint is None:
        raise ValueError(f"{folder.path}: there is no checkpoint to resume from; start the run again")
    saved = folder.config
    config = OmegaConf.create(_moved(saved, saved["run_dir"], str(folder.path)))
    assert isinstance(config, DictConfig)
    if any(override.startswith("logger") for override in overrides):
        config.logger = given.logger
    return folder, config, checkpoint


def _moved(value: Any, old: str, new: str) -> Any:
    """Saved settings with a run folder's old path, relative to another working directory perhaps, made its new one."""
    if isinstance(value, dict):
        return {key: _moved(entry, old, new) for key, entry in value.items()}
    if isinstance(value, str) and (value == old or value.startswith(f"{old}/")):
        return new + value[len(old) :]
    return value


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


def _target_states(config: DictConfig, target: Target, data: SpeculatorDataModule) -> Callable[[Batch], TargetStates]:
    """Where the target's states come from: the target itself or a capture; either is remembered on request."""
    if config.states_dir is None:
        return RememberedStates(target.states, config.states_memory_gb)
    captured = CapturedStates(Path(config.states_dir), target)
    captured.check(data.train_set, data.validation_set)
    return RememberedStates(captured, config.states_memory_gb)


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
    for entry in config.callbacks.values():
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
    for name, text in lines.items():
        console.print(f"[bold]{name:<11}[/bold]{text}", highlight=False, soft_wrap=True)


def _finish(trainer: Trainer, folder: RunFolder, suite: Suite, module: SpeculatorModule) -> dict[str, float]:
    """Saves final metrics, the hyper-parameters tab and the figures; returns the acceptance lengths."""
    final = {f"{row.benchmark}/T{row.temperature:g}/K{row.num_draft_tokens}": row.tau for row in suite.last_rows}
    if trainer.is_global_zero:
        logged = {name: float(value) for name, value in trainer.logged_metrics.items()}
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
