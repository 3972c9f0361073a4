"""Builds the parts of a run from its configuration; shared by the entry points."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from lkspec.app.application import instantiate, resolved
from lkspec.benchmarks.base import Benchmark
from lkspec.data.datamodule import SpeculatorDataModule
from lkspec.data.encoded import EncodedData
from lkspec.drafts.base import Draft
from lkspec.export.reading import Pretrained
from lkspec.measure.suite import RunFacts
from lkspec.runs.folder import RunFolder
from lkspec.targets.base import Target
from lkspec.targets.dims import with_layer
from lkspec.vocab import DraftVocab, default_size

Share = Callable[[Callable[[], EncodedData]], EncodedData]


def open_data(config: DictConfig, target: Target, *, share: Share | None = None) -> SpeculatorDataModule:
    """The data of a configuration, tokenised for a target; ``share`` may give what an earlier call of it was given.

    Raises:
        ValueError: as ``SpeculatorDataModule`` and its ``read``.
    """
    data: SpeculatorDataModule = instantiate(config.data)
    data.bind(target.tokenizer, eos_ids=target.eos_ids, max_positions=target.max_positions)
    data.adopt(data.read() if share is None else share(data.read))
    return data


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
    ``assemble.py``) and ``layer``, what of its decoder layer is not the target's, in the words of a Llama config.
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
