"""Builds the parts of a run from its configuration; shared by the entry points."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from lkspec.app.application import instantiate, resolved
from lkspec.app.evaluation import Evaluation
from lkspec.app.sweeps import Sweep
from lkspec.benchmarks.base import Benchmark
from lkspec.data.captured import CapturedStates
from lkspec.data.datamodule import SpeculatorDataModule
from lkspec.drafts.base import Draft, UnrollOptions
from lkspec.export.reading import Pretrained
from lkspec.losses.fused.head_summary import head_summary
from lkspec.measure.benchmark import Measurement
from lkspec.runs.facts import RunFacts
from lkspec.runs.folder import RunFolder
from lkspec.targets.base import Target
from lkspec.targets.dims import with_layer
from lkspec.targets.memory import RememberedStates
from lkspec.training.callbacks import AcceptanceLength
from lkspec.training.module import SpeculatorModule
from lkspec.training.run import Trainer, make_trainer
from lkspec.types import Batch, TargetStates
from lkspec.vocab import DraftVocab, default_size


def open_data(config: DictConfig, target: Target, sweep: Sweep | None = None) -> SpeculatorDataModule:
    """The data set of a configuration, read and tokenised for a target; jobs of a sweep read it once.

    Raises:
        ValueError: as ``SpeculatorDataModule``.
    """
    data: SpeculatorDataModule = instantiate(config.data)
    data.bind(target.tokenizer, eos_ids=target.eos_ids, max_positions=target.max_positions)
    sweep = sweep or Sweep()
    data.adopt(sweep.once("data", [resolved(config.target), data.read_settings], data.read))
    return data


def target_and_data(config: DictConfig, sweep: Sweep) -> tuple[Target, SpeculatorDataModule]:
    """The target, and the data tokenised for it; jobs of a sweep share them."""
    target: Target = sweep.once("target", resolved(config.target), lambda: instantiate(config.target))
    return target, open_data(config, target, sweep)


def build_states(
    config: DictConfig, draft: Draft, target: Target, data: SpeculatorDataModule, sweep: Sweep
) -> Callable[[Batch], TargetStates]:
    """Where the target's states come from: the target itself or a capture; either is remembered on request."""
    states: Callable[[Batch], TargetStates] = target.states
    if config.states_dir is not None:
        states = captured = CapturedStates(Path(config.states_dir), target)
        captured.check(data.train_set, data.validation_set)
    fills_alone = target.device.type == "cpu" or config.states_dir is not None
    source = [resolved(config.target), data.read_settings, config.states_dir, config.states_memory_gb]
    return sweep.once(
        "states",
        [*source, draft.reads_aux, draft.vocab.is_full],
        lambda: RememberedStates(
            states,
            config.states_memory_gb,
            company=None if fills_alone else data.encoded.company(),
            summarise=None if draft.vocab.is_full else partial(head_summary, target.head),
            with_aux=draft.reads_aux,
        ),
    )


def build_vocab(config: DictConfig, target: Target, data: SpeculatorDataModule) -> DraftVocab:
    """The draft vocabulary: the tokens supervised most often; null is the full one, ``auto`` the draft's usual size.

    Raises:
        ValueError: a size that is none of these.
    """
    size = config.vocab.size
    if size == "auto":
        draft_class = hydra.utils.get_class(config.draft._target_)
        size = None if getattr(draft_class, "full_vocabulary", False) else default_size(target.vocab_size)
    if size is None:
        return DraftVocab.full(target.vocab_size)
    if not isinstance(size, int):
        raise ValueError(f"vocab.size: expected a number of tokens, 'auto' or null (all tokens), got {size!r}")
    return DraftVocab.from_counts(data.token_counts(target.vocab_size), size, keep=target.special_ids)


def build_draft(config: DictConfig, target: Target, vocab: DraftVocab) -> Draft:
    """The draft of a configuration, on the target's device.

    Three keys are not its class's: ``freeze``, names of parameters to leave as they are, ``init_from`` (see
    ``load.py``) and ``layer``, what of its decoder layer is not the target's, in the words of a Llama config.
    """
    own = OmegaConf.masked_copy(config, [str(key) for key in config if key not in ("freeze", "init_from", "layer")])
    draft: Draft = instantiate(own, with_layer(target.spec, draft_layer(config)), vocab)
    draft.freeze(config.get("freeze") or ())
    return draft.to(target.device)


def draft_layer(config: DictConfig) -> dict[str, Any] | None:
    """The key ``layer`` of a draft's configuration, plain."""
    layer = config.get("layer")
    return None if layer is None else resolved(layer)


def expanded_draft(config: DictConfig) -> DictConfig:
    """``draft=pretrained`` in the words of the class that its checkpoint holds; any other draft as it is.

    Raises:
        ValueError: no checkpoint of a known format.
    """
    if "path" not in config or "_target_" in config:
        return config
    given = {key: value for key, value in resolved(config).items() if value is not None and key != "path"}
    path = Path(config.path).expanduser()
    source = str(path.absolute()) if path.is_dir() else config.path  # found from any working directory
    return OmegaConf.create({**Pretrained.open(source).settings, **given, "init_from": source})


def build_benchmarks(config: DictConfig) -> list[Benchmark]:
    """The benchmarks of the group's choices (plain values beside them are their shared arguments)."""
    return [instantiate(entry) for entry in config.values() if isinstance(entry, DictConfig) and "_target_" in entry]


def build_module(
    config: DictConfig, draft: Draft, target: Target, data: SpeculatorDataModule, evaluation: Evaluation, sweep: Sweep
) -> SpeculatorModule:
    """What Lightning trains."""

    def evaluate(stage: str, step: int) -> list[Measurement]:
        return evaluation.run(module.draft, stage=stage, step=step, supervised_tokens=module.num_supervised_seen)

    draft.unroll_options = UnrollOptions(**resolved(config.unroll))
    module = SpeculatorModule(
        draft,
        instantiate(config.loss),
        target_states=build_states(config, draft, target, data, sweep),
        target_head=target.head,
        optimizer=instantiate(config.optimizer),
        scheduler=instantiate(config.scheduler),
        gamma=config.loss_options.gamma,
        gradient_clip=config.gradient_clip,
        chunk_size=config.loss_options.chunk_size,
        evaluate=evaluate,
        checkpoint_info={
            "config": resolved(config),
            "target_fingerprint": target.fingerprint,
            "data_fingerprint": data.fingerprint,
        },
    )
    return module


def build_trainer(config: DictConfig, folder: RunFolder, evaluation: Evaluation, draft: Draft) -> Trainer:
    """The trainer with its callbacks and loggers; ``{run_dir}`` in their settings is the run's folder.

    Raises:
        ValueError: as ``make_trainer``; benchmarks that are to be decoded with settings that the draft does not take.
    """
    callbacks, loggers = (
        [instantiate(_in_folder(entry, folder)) for entry in group.values() if entry is not None]  # null switches off
        for group in (config.callbacks, config.logger)
    )
    if any(isinstance(callback, AcceptanceLength) for callback in callbacks):
        evaluation.options.check(draft)
    options = {"callbacks": callbacks, "logger": loggers}
    return make_trainer(lambda: instantiate(config.trainer, **options), str(config.trainer.precision))


def _in_folder(entry: DictConfig, folder: RunFolder) -> DictConfig:
    text = {key: value.replace("{run_dir}", str(folder.path)) for key, value in entry.items() if isinstance(value, str)}
    return OmegaConf.create({**entry, **text})


def run_facts(config: DictConfig, folder: RunFolder, target: Target, info: dict[str, Any]) -> RunFacts:
    """What results rows say of a run; ``info`` holds the data's fingerprint."""
    arguments = {key: value for key, value in resolved(config.loss).items() if key != "_target_"}
    return RunFacts(
        folder=folder,
        draft=config.names.draft,
        loss=config.names.loss,
        loss_arguments=arguments,
        target=target.name,
        target_settings={"dtype": str(target.dtype), "attn_implementation": target.attn_implementation},
        data_fingerprint=info["data_fingerprint"],
        seed=config.seed,
        eta=arguments.get("eta"),
        eta_source=eta_source(config),
    )


def eta_source(config: DictConfig) -> str | None:
    """Who chose the adaptive objective's eta; None for objectives without one."""
    eta = config.loss.get("eta")
    if eta is None:
        return None
    return (
        f"the paper's for {config.names.draft}" if eta == config.draft.get("paper_eta") else "set by the configuration"
    )
