"""Builds the parts of a run from its configuration; shared by the entry points."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig, OmegaConf

from lkspec.benchmarks.base import Benchmark
from lkspec.config import instantiate, resolved
from lkspec.data.datamodule import SpeculatorDataModule
from lkspec.drafts.base import Draft
from lkspec.module import CHECKPOINT_KEY
from lkspec.results import RunFolder, find_run
from lkspec.suite import RunFacts
from lkspec.targets.base import Target
from lkspec.vocab import DraftVocab, default_size


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

    Two keys are every draft's: ``freeze``, names of parameters to leave as they are, and ``init_from`` (see below).
    """
    own = OmegaConf.masked_copy(config, [str(key) for key in config if key not in ("freeze", "init_from")])
    draft: Draft = instantiate(own, target.spec, vocab)
    draft.freeze(config.get("freeze") or ())
    return draft.to(target.device)


def initial_weights(source: str | None, root: Path, target: Target) -> dict[str, torch.Tensor] | None:
    """The draft tensors of the run that ``draft.init_from`` names; None when it names no run.

    ``latest``, the beginning of a run's name and a path are runs; another folder and a hub id (``org/name``) are not.

    Raises:
        ValueError: no such run, or one of another target.
    """
    if source is None or (Path(source).is_dir() and not (Path(source) / "config.yaml").is_file()):
        return None
    if "/" in source and not Path(source).exists():
        return None
    folder = find_run(source, root)
    checkpoint = read_checkpoint(folder)
    _check_target(folder, checkpoint, target)
    return draft_weights(checkpoint)


def init_draft(draft: Draft, source: str, weights: dict[str, torch.Tensor] | None) -> None:
    """Starts a draft from the tensors of a run, or, without them, from a folder or hub id in an engine's format.

    Raises:
        ValueError: a tensor that is missing, too many, or of another shape, or a draft vocabulary of other tokens.
    """
    if weights is None:
        draft.load_folder(source)
        return
    own = draft.state_dict()
    for name in [*own, *(name for name in weights if name not in own)]:
        ours, theirs = (list(known[name].shape) if name in known else "missing" for known in (own, weights))
        if ours != theirs:
            raise ValueError(f"draft.init_from={source}: {name} is {theirs} there, {ours} in this draft")
    if not torch.equal(weights["vocab.ids"], own["vocab.ids"].cpu()):
        raise ValueError(
            f"draft.init_from={source}: its draft vocabulary holds other tokens; vocab.size=auto takes it over"
        )
    draft.load_state_dict(weights)


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
    checkpoint = read_checkpoint(folder)
    target: Target = instantiate(config.target)
    _check_target(folder, checkpoint, target)
    weights = draft_weights(checkpoint)
    draft = build_draft(config.draft, target, DraftVocab(weights["vocab.ids"], target.vocab_size))
    try:
        draft.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(
            f"{folder.path}: its checkpoint does not fit the draft of its configuration: {error}"
        ) from error
    return TrainedRun(folder, config, target, draft.eval(), checkpoint[CHECKPOINT_KEY], step=checkpoint["global_step"])


def read_checkpoint(folder: RunFolder) -> dict[str, Any]:
    """The newest checkpoint of a run.

    Raises:
        ValueError: there is none.
    """
    path = folder.last_checkpoint
    if path is None:
        raise ValueError(f"{folder.path}: the run has no checkpoint; it ended before the first one was written")
    checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return checkpoint


def _check_target(folder: RunFolder, checkpoint: dict[str, Any], target: Target) -> None:
    trained_for = checkpoint[CHECKPOINT_KEY]["target_fingerprint"]
    if trained_for != target.fingerprint:
        raise ValueError(
            f"{folder.path}: the run was trained for a target with fingerprint {trained_for}, but "
            f"{target.name} has {target.fingerprint}: another target, or its weights have changed since"
        )


def draft_weights(checkpoint: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The draft's tensors of a checkpoint, its vocabulary among them."""
    return {name.removeprefix("draft."): value for name, value in checkpoint["state_dict"].items()}


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
