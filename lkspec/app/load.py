"""Drafts that are there already: finished runs, and checkpoints in an engine's format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from lkspec.app.application import instantiate, resolved
from lkspec.app.build import build_draft, build_vocab, draft_layer, expanded_draft
from lkspec.app.job import Job
from lkspec.data.datamodule import SpeculatorDataModule
from lkspec.drafts.base import Draft
from lkspec.export.reading import Pretrained, fill, fingerprint
from lkspec.runs.find import find_run
from lkspec.runs.folder import RunFolder, run_name
from lkspec.runs.identity import measured_by
from lkspec.targets.base import Target
from lkspec.targets.dims import different_words, llama_words, with_layer
from lkspec.training.module import CHECKPOINT_KEY
from lkspec.vocab import DraftVocab

PRETRAINED_KEY = "pretrained"  # of the configuration of a run folder that nothing was trained in
# What training starts with or how long it is, not what the draft computes.
_NOT_STRUCTURE = ("_target_", "num_depths", "head_init", "layer_init", "paper_eta", "freeze", "init_from", "layer")


@dataclass(frozen=True)
class InitialWeights:
    """Where ``draft.init_from`` leads.

    Attributes:
        source: as it was written.
        settings: the draft there, in the words of a run's configuration.
        vocab: its draft vocabulary.
        tensors: what it gives to a draft, by our names.
    """

    source: str
    settings: Mapping[str, Any]
    vocab: DraftVocab
    tensors: Callable[[Draft], Mapping[str, Tensor]]


def initial_weights(source: str, root: Path, target: Target) -> InitialWeights:
    """The run or the checkpoint that ``draft.init_from`` names.

    ``latest``, the beginning of a run's name and a path are runs; another folder and a hub id (``org/name``) are
    checkpoints in an engine's format.

    Raises:
        ValueError: no such run or checkpoint, or one of another target.
    """
    if not _is_checkpoint(source):
        folder = find_run(source, root)
        if PRETRAINED_KEY not in folder.config:
            checkpoint = read_checkpoint(folder)
            _check_target(folder, checkpoint[CHECKPOINT_KEY]["target_fingerprint"], target)
            weights = draft_weights(checkpoint)
            vocab = DraftVocab(weights["vocab.ids"], target.vocab_size)
            return InitialWeights(source, folder.config["draft"], vocab, lambda draft: weights)
        source = folder.config["draft"]["init_from"]
    pretrained = Pretrained.open(source)
    return InitialWeights(
        source,
        pretrained.settings,
        pretrained.vocab(target.vocab_size),
        lambda draft: pretrained.tensors(draft, target),
    )


def init_draft(draft: Draft, initial: InitialWeights, config: DictConfig, target: Target) -> None:
    """Starts the draft of a configuration from existing weights.

    Raises:
        ValueError: an argument that makes it compute something else, a tensor that is missing, too many, or of another
            shape, or a draft vocabulary of other tokens.
    """
    where = f"draft.init_from={initial.source}"
    ours = resolved(config)
    if initial.settings["_target_"] == ours["_target_"]:
        for key, value in initial.settings.items():
            if key in ours and key not in _NOT_STRUCTURE and ours[key] != value and ours[key] is not None:
                raise ValueError(
                    f"{where}: draft.{key} is {value!r} there, {ours[key]!r} in this draft; make them equal"
                )
        _check_layer(where, initial.settings.get("layer"), draft_layer(config), target)
    fill(draft, initial.tensors(draft), where)


def draft_to_train(job: Job, target: Target, data: SpeculatorDataModule) -> Draft:
    """The draft of a job, from its checkpoint, from ``draft.init_from``, or from random numbers."""
    config = job.config
    if job.checkpoint is not None:  # Lightning restores its weights; the vocabulary is needed before
        ids = draft_weights(read_checkpoint(job.folder))["vocab.ids"]
        return build_draft(config.draft, target, DraftVocab(ids, target.vocab_size))
    source = config.draft.get("init_from")
    if source is None:
        return build_draft(config.draft, target, build_vocab(config, target, data))
    initial = initial_weights(source, Path(config.run_root), target)
    vocab = initial.vocab if config.vocab.size == "auto" else build_vocab(config, target, data)
    draft = build_draft(config.draft, target, vocab)
    init_draft(draft, initial, config.draft, target)
    return draft


def _check_layer(where: str, theirs: Mapping[str, Any] | None, ours: Mapping[str, Any] | None, target: Target) -> None:
    """Compares what decoder layers compute; positions beyond an engine's limit are none of it."""
    there, here = (with_layer(target.spec, layer).dims for layer in (theirs, ours))
    for key in different_words(there, here):
        if key != "max_position_embeddings":
            raise ValueError(
                f"{where}: its decoder layer has {key} {llama_words(there)[key]}, this draft's "
                f"{llama_words(here)[key]}; set draft.layer.{key}, or take everything over with draft=pretrained "
                "draft.path=..."
            )


def _is_checkpoint(source: str) -> bool:
    path = Path(source)
    if path.is_dir():
        return not (path / "config.yaml").is_file()
    return "/" in source and not path.exists()


@dataclass(frozen=True)
class TrainedRun:
    """A finished (or interrupted) run, or a checkpoint in an engine's format, loaded."""

    folder: RunFolder
    config: DictConfig
    target: Target
    draft: Draft
    info: dict[str, Any]
    step: int

    @property
    def is_pretrained(self) -> bool:
        """Whether nothing was trained: the draft is a checkpoint's."""
        return PRETRAINED_KEY in self.config

    def note_measuring_code(self) -> None:
        """Records that the run's rows were measured by the code of now."""
        identity = self.folder.read_identity()
        if identity is not None:
            self.folder.write_identity({**identity, "measured_by": measured_by(resolved(self.config))})


def open_run(config: DictConfig) -> TrainedRun:
    """What an entry point is asked to look at: ``run=...``, or ``draft=pretrained draft.path=... target=...``.

    A checkpoint gets a run folder, so that its results stand where those of runs do.

    Raises:
        ValueError: none of both or both, and as ``load_run``.
    """
    root = Path(config.run_root)
    options = {"device": config.device, "dtype": config.dtype}
    if config.get("draft") is None:
        return load_run(find_run(config.run, root), **options)
    if config.run is not None:
        raise ValueError(f"run={config.run} and draft=pretrained: give one of them")
    if config.get("target") is None:
        raise ValueError("draft=pretrained: say for which target, as target=...")
    return load_run(_pretrained_folder(config, root), **options)


def _pretrained_folder(config: DictConfig, root: Path) -> RunFolder:
    """The run folder of a checkpoint, made when it is not there yet."""
    draft, target = expanded_draft(config.draft), instantiate(config.target)
    built = Pretrained.open(draft.init_from).build(target)
    name = Path(draft.init_from).name
    settings = {
        "draft": resolved(draft),
        "target": resolved(config.target),
        "loss": {},
        "names": {"draft": name, "loss": PRETRAINED_KEY, "target": target.name, "data": "none"},
        "seed": 0,
        PRETRAINED_KEY: {"fingerprint": fingerprint(built), "target_fingerprint": target.fingerprint},
    }
    of_target = {key: value for key, value in resolved(config.target).items() if key not in ("device", "dtype")}
    folder_name = run_name(name, PRETRAINED_KEY, target.name, seed=0, outcome={**settings, "target": of_target})
    folder = RunFolder(root / folder_name)
    if (folder.path / "config.yaml").is_file():
        return folder
    return RunFolder.create(root, folder_name, config=settings, overrides=[])


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
    if PRETRAINED_KEY in config:
        return _load_pretrained(folder, config)
    checkpoint = read_checkpoint(folder)
    target: Target = instantiate(config.target)
    _check_target(folder, checkpoint[CHECKPOINT_KEY]["target_fingerprint"], target)
    weights = draft_weights(checkpoint)
    draft = build_draft(config.draft, target, DraftVocab(weights["vocab.ids"], target.vocab_size))
    try:
        draft.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(
            f"{folder.path}: its checkpoint does not fit the draft of its configuration: {error}"
        ) from error
    return TrainedRun(folder, config, target, draft.eval(), checkpoint[CHECKPOINT_KEY], step=checkpoint["global_step"])


def _load_pretrained(folder: RunFolder, config: DictConfig) -> TrainedRun:
    target: Target = instantiate(config.target)
    recorded = config[PRETRAINED_KEY]
    _check_target(folder, recorded.target_fingerprint, target)
    initial = initial_weights(config.draft.init_from, folder.path.parent, target)
    draft = build_draft(config.draft, target, initial.vocab)
    init_draft(draft, initial, config.draft, target)
    if fingerprint(draft) != recorded.fingerprint:
        raise ValueError(
            f"{folder.path}: {config.draft.init_from} has other weights than when this folder was made; give it again "
            "as draft=pretrained draft.path=... for a new one"
        )
    info = {"target_fingerprint": target.fingerprint, "data_fingerprint": "none", "num_supervised_seen": 0}
    return TrainedRun(folder, config, target, draft.eval(), info, step=0)


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


def _check_target(folder: RunFolder, trained_for: str, target: Target) -> None:
    if trained_for != target.fingerprint:
        raise ValueError(
            f"{folder.path}: the run was trained for a target with fingerprint {trained_for}, but "
            f"{target.name} has {target.fingerprint}: another target, or its weights have changed since"
        )


def draft_weights(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """The draft's tensors of a checkpoint, its vocabulary among them."""
    return {name.removeprefix("draft."): value for name, value in checkpoint["state_dict"].items()}
