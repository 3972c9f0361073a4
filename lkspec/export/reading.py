"""The one way in: a checkpoint in any known format as our class, its arguments and its tensors."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lkspec.drafts.base import Draft
from lkspec.export.base import Layout
from lkspec.export.eagle3 import PlainEagle3, SpeculatorsEagle3
from lkspec.export.medusa import OriginalMedusa, VllmMedusa
from lkspec.export.mlp import FmsMLP
from lkspec.export.mtp import NativeMTP
from lkspec.export.tensor_folder import TensorFolder
from lkspec.targets.base import Target
from lkspec.targets.dims import with_layer
from lkspec.vocab import DraftVocab

LAYOUTS: tuple[Layout, ...] = (
    PlainEagle3(),
    SpeculatorsEagle3(),
    VllmMedusa(),
    OriginalMedusa(),
    FmsMLP(),
    NativeMTP(),
)


@dataclass(frozen=True)
class Pretrained:
    """A draft's checkpoint, opened; make one by ``open``."""

    folder: TensorFolder
    layout: Layout

    @classmethod
    def open(cls, path: str) -> Pretrained:
        """The checkpoint in a folder or on the hub.

        Raises:
            ValueError: no checkpoint, or none of a known format.
        """
        folder = TensorFolder(path)
        for layout in LAYOUTS:
            if layout.recognises(folder):
                return cls(folder, layout)
        config = folder.config
        raise ValueError(
            f"{path}: not a draft of a known format (architectures {config.get('architectures')}, model_type "
            f"{config.get('model_type')!r}); expected EAGLE-3 (plain or speculators), Medusa, an MLP speculator or a "
            f"target with an MTP module. If it is the target itself: targets of type {config.get('model_type')} have "
            "no MTP module of their own; use draft=mtp, which builds one from the target's decoder layer"
        )

    @property
    def settings(self) -> dict[str, Any]:
        """The draft in the words of a run's configuration: class and arguments."""
        made = self.layout.draft_class
        eta = inspect.signature(made).parameters["paper_eta"].default
        target = {"_target_": f"{made.__module__}.{made.__qualname__}"}
        return {**target, **self.layout.settings(self.folder), "paper_eta": eta}

    def vocab(self, target_size: int) -> DraftVocab:
        """Its draft vocabulary."""
        return DraftVocab(self.layout.row_ids(self.folder, target_size).sort().values, target_size)

    def tensors(self, draft: Draft, target: Target) -> dict[str, Tensor]:
        """Its tensors by our names; ``vocab.ids`` is among them where they depend on the vocabulary.

        Raises:
            ValueError: another class of draft, another target, a tensor that is missing or has no place.
        """
        if not isinstance(draft, self.layout.draft_class):
            raise ValueError(
                f"{self.folder.path}: holds a draft of class {self.layout.draft_class.__name__}, this one is "
                f"{type(draft).__name__}"
            )
        self.layout.check_target(self.folder, target)
        tensors = self.layout.tensors(self.folder, draft)
        if not self.layout.any_vocabulary:
            tensors["vocab.ids"] = self.vocab(target.vocab_size).ids
        return tensors

    def build(self, target: Target, **arguments: Any) -> Draft:
        """The draft itself; ``arguments`` go before the checkpoint's settings."""
        settings = {**self.settings, **arguments}
        spec = with_layer(target.spec, settings.pop("layer", None))
        del settings["_target_"]
        self.layout.check_target(self.folder, target)
        made: Callable[..., Draft] = self.layout.draft_class
        draft = made(spec, self.vocab(target.vocab_size), **settings).to(target.device)
        fill(draft, self.tensors(draft, target), self.folder.path)
        return draft.eval()


def fill(draft: Draft, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copies tensors by our names into a draft.

    Raises:
        ValueError: a tensor that is missing, too many, or of another shape, or a draft vocabulary of other tokens.
    """
    own = draft.state_dict()
    for name in {**own, **tensors}:
        ours, theirs = (list(known[name].shape) if name in known else "missing" for known in (own, tensors))
        if ours != theirs and (name != "vocab.ids" or name in tensors):
            raise ValueError(f"{source}: {name} is {theirs} there, {ours} in this draft")
    if "vocab.ids" in tensors and not torch.equal(tensors["vocab.ids"].cpu(), own["vocab.ids"].cpu()):
        raise ValueError(f"{source}: its draft vocabulary holds other tokens; vocab.size=auto takes it over")
    draft.load_state_dict({**own, **tensors})


def fingerprint(draft: Draft) -> str:
    """16 hex digits over samples of every tensor: a checkpoint that has changed has another."""
    digest = hashlib.sha256(type(draft).__name__.encode())
    for name, tensor in draft.state_dict().items():
        sample = tensor.flatten()[:: max(1, tensor.numel() // 512)].double().cpu()
        digest.update(name.encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:16]
