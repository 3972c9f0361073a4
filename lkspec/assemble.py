"""Builds the parts of a run from its configuration; shared by the entry points."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from lkspec.benchmarks.base import Benchmark
from lkspec.config import instantiate, resolved
from lkspec.data.datamodule import SpeculatorDataModule
from lkspec.drafts.base import Draft
from lkspec.module import CHECKPOINT_KEY
from lkspec.results import RunFolder
from lkspec.suite import RunFacts
from lkspec.targets.base import Target
from lkspec.vocab import DraftVocab, default_size


def build_vocab(size: int | str | None, target: Target, data: SpeculatorDataModule) -> DraftVocab:
    """The draft vocabulary: the tokens supervised most often; null is the full one, ``auto`` the usual size.

    Raises:
        ValueError: a size that is none of these.
    """
    if size is None:
        return DraftVocab.full(target.vocab_size)
    if size == "auto":
        size = default_size(target.vocab_size)
    if not isinstance(size, int):
        raise ValueError(f"vocab.size: expected a number of tokens, 'auto' or null (all tokens), got {size!r}")
    return DraftVocab.from_counts(data.token_counts(target.vocab_size), size, keep=target.special_ids)


def build_draft(config: DictConfig, target: Target, vocab: DraftVocab) -> Draft:
    """The draft of a configuration, on the target's device."""
    draft: Draft = instantiate(config, target.spec, vocab)
    return draft.to(target.device)


def build_benchmarks(config: DictConfig) -> list[Benchmark]:
    """The benchmarks of the group's choices (plain values beside them are their shared arguments)."""
    return [instantiate(entry) for entry in config.values() if isinstance(entry, DictConfig) and "_target_" in entry]


@dataclass(frozen=True)
class TrainedRun:
    """A finished (or interrupted) run, loaded."""

    folder: RunFolder
    config: DictConfig
    target: Target
    draft: Draft
    info: dict[str, Any]
    step: int


def load_run(folder: RunFolder, *, device: str | None = None, dtype: str | None = None) -> TrainedRun:
    """Loads the newest checkpoint of a run beside the target of its saved configuration.

    ``device`` and ``dtype`` say where and how the target runs now; everything else is the run's own.

    Raises:
        ValueError: no checkpoint, a checkpoint that lacks a draft tensor, or a target that is not the run's.
    """
    config = OmegaConf.create(folder.config)
    assert isinstance(config, DictConfig)
    for key, value in (("device", device), ("dtype", dtype)):
        if value is not None:
            config.target[key] = value
    path = folder.last_checkpoint
    if path is None:
        raise ValueError(f"{folder.path}: the run has no checkpoint; it ended before the first one was written")
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    target: Target = instantiate(config.target)
    info = checkpoint[CHECKPOINT_KEY]
    if info["target_fingerprint"] != target.fingerprint:
        raise ValueError(
            f"{folder.path}: the run was trained for a target with fingerprint {info['target_fingerprint']}, but "
            f"{target.name} has {target.fingerprint}: its weights have changed since"
        )
    weights = {name.removeprefix("draft."): value for name, value in checkpoint["state_dict"].items()}
    draft = build_draft(config.draft, target, DraftVocab(weights["vocab.ids"], target.vocab_size))
    try:
        draft.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{path}: does not fit the draft of the run's configuration: {error}") from error
    return TrainedRun(folder, config, target, draft.eval(), info, step=checkpoint["global_step"])


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
        eta_source=config.eta_source,
    )
