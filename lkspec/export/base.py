"""What every on-disk format of a draft has in common."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Int
from safetensors.torch import save_file
from torch import Tensor

from lkspec.drafts.base import Draft
from lkspec.export.tensor_folder import TensorFolder
from lkspec.targets.base import Target

_WRAPPERS = ("speculator.", "model.")


@dataclass(frozen=True)
class ServeCommand:
    """How an engine is started with an export; ``options_for_q`` says which of its words make it sample from q."""

    engine: str
    command: str
    options_for_q: str


class Layout(ABC):
    """One on-disk format of one architecture, both ways.

    Attributes:
        format: its word in ``lkspec export format=``; None is read only.
        draft_class: what it holds.
        served_by: the engines and versions that load it.
        any_vocabulary: its tensors are the same for every draft vocabulary.
    """

    any_vocabulary: ClassVar[bool] = False
    format: ClassVar[str | None]
    draft_class: ClassVar[type[Draft]]
    served_by: ClassVar[str]

    @abstractmethod
    def recognises(self, folder: TensorFolder) -> bool:
        """Whether a checkpoint is of this format, by its config."""

    @abstractmethod
    def settings(self, folder: TensorFolder) -> dict[str, Any]:
        """The draft's arguments in the words of a run's configuration.

        Raises:
            ValueError: something that our class does not compute.
        """

    @abstractmethod
    def tensors(self, folder: TensorFolder, draft: Draft) -> dict[str, Tensor]:
        """The draft's tensors by our names, the vocabulary left out.

        Raises:
            ValueError: a tensor that is missing or has no place.
        """

    @abstractmethod
    def write(self, folder: Path, draft: Draft, target: Target, options: WriteOptions) -> None:
        """Fills a folder.

        Raises:
            ValueError: something that the format cannot express.
        """

    def vocab_ids(self, folder: TensorFolder, target_size: int) -> Int[Tensor, " D"]:
        """Target id of each draft id, ascending."""
        return torch.arange(target_size)

    @abstractmethod
    def check_target(self, folder: TensorFolder, target: Target) -> None:
        """Refuses a target whose states are not those that the draft reads.

        Raises:
            ValueError: says what to set.
        """

    @abstractmethod
    def checks(self, folder: TensorFolder, draft: Draft, target: Target) -> list[str]:
        """Compares what was written with the draft and its target; one sentence each of what was found to be right.

        Raises:
            ValueError: a value that differs.
        """

    @abstractmethod
    def serve_commands(self, draft: Draft, target_path: str, path: str, options: WriteOptions) -> list[ServeCommand]:
        """Commands of the engines that serve it; ``path`` is the export, ``target_path`` the target."""


@dataclass(frozen=True)
class WriteOptions:
    """How an export is written.

    Attributes:
        dtype: of the weights.
        num_draft_tokens: drafted tokens a round, where a config says so.
        target_copy: MTP: the whole target with the module in it instead of the module alone.
        target_id: what others call the target (a hub id); None is where it was loaded from.
    """

    dtype: torch.dtype = torch.float32
    num_draft_tokens: int = 4
    target_copy: bool = False
    target_id: str | None = None

    def target_path(self, target: Target) -> str:
        """How configs and commands name the target."""
        return self.target_id or target.source or target.name


class Reader:
    """A checkpoint's tensors by their bare names (``speculator.`` and ``model.`` in front are taken off).

    Raises:
        ValueError: one tensor under two names.
    """

    def __init__(self, folder: TensorFolder, canonical: Callable[[str], str] = lambda name: name) -> None:
        self._folder = folder
        self._names: dict[str, str] = {}
        self._read: set[str] = set()
        for name in folder.names(""):
            bare = canonical(_unwrapped(name))
            if bare in self._names:
                raise ValueError(f"{folder.path}: {self._names[bare]} and {name} are the same tensor of this format")
            self._names[bare] = name

    def __contains__(self, name: str) -> bool:
        return name in self._names

    @property
    def names(self) -> list[str]:
        """All bare names."""
        return list(self._names)

    def get(self, name: str) -> Tensor:
        """One tensor.

        Raises:
            ValueError: it is missing.
        """
        self.skip(name)
        return self._folder.get(self._names.get(name, name))

    def skip(self, name: str) -> None:
        """Counts a tensor as read."""
        self._read.add(name)

    def finish(self) -> None:
        """Refuses what was not read.

        Raises:
            ValueError: names it.
        """
        unread = [theirs for bare, theirs in self._names.items() if bare not in self._read]
        if unread:
            raise ValueError(f"{self._folder.path}: no place for {', '.join(unread[:5])} ({len(unread)} in all)")


def refuse_other_values(folder: TensorFolder, config: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Refuses a config that says something else than what our class computes; keys may be absent.

    Raises:
        ValueError: the key, its value and the only one that is understood.
    """
    for key, value in expected.items():
        if config.get(key, value) not in (value, None):
            raise ValueError(
                f"{folder.path}: config.json says {key}={config[key]!r}, but lkspec's draft of this kind has "
                f"{key}={value!r}"
            )


def whole_config(folder: TensorFolder, config: Mapping[str, Any], keys: tuple[str, ...]) -> None:
    """Refuses a config without a key that has no usual value.

    Raises:
        ValueError: the keys that are missing.
    """
    missing = [key for key in keys if key not in config]
    if missing:
        raise ValueError(f"{folder.path}: config.json has no {', '.join(missing)}")


def sorted_ids(ids: Int[Tensor, " D"]) -> tuple[Int[Tensor, " D"], Int[Tensor, " D"]]:
    """Ascending target ids, and the order in which rows of a head follow them."""
    order = torch.argsort(ids)
    return ids[order], order


def same_as_target(folder: TensorFolder, name: str, copy: Tensor, ours: Tensor) -> None:
    """Checks a checkpoint's copy of a tensor that our drafts share with the target, to the precision of bfloat16.

    Raises:
        ValueError: it is another tensor.
    """
    same_shape = copy.shape == ours.shape
    # float16 copies have lost the smallest values, bfloat16 ones the last bits.
    if not same_shape or not torch.allclose(copy.to(ours.device).float(), ours.float(), rtol=2**-7, atol=1e-6):
        raise ValueError(
            f"{folder.path}: {name} is not the target's own, but lkspec's drafts share that tensor with the target; "
            "was the checkpoint made for another target?"
        )


def write_checkpoint(
    folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], dtype: torch.dtype
) -> None:
    """model.safetensors and config.json; floating-point tensors are cast."""
    saved = {
        name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).detach().cpu().contiguous().clone()
        for name, tensor in tensors.items()
    }
    save_file(saved, folder / "model.safetensors", metadata={"format": "pt"})
    write_config(folder, config)


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """config.json."""
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def dtype_name(dtype: torch.dtype) -> str:
    """As configs spell it."""
    return str(dtype).removeprefix("torch.")


def _unwrapped(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.removeprefix(wrapper)
    return name
