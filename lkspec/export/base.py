"""What every on-disk format of a draft has in common: one table of names and arguments, read and written."""

from __future__ import annotations

import fnmatch
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Int
from safetensors.torch import save_file
from torch import Tensor

from lkspec.drafts.base import Draft
from lkspec.export.serving import ServeCommand, sglang_command, vllm_command
from lkspec.export.tensor_folder import TensorFolder
from lkspec.targets.base import Target


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
    """Reads a checkpoint's tensors by the format's own names, and notes which.

    Attributes:
        stored: the format's name of each tensor -> that in the files.

    Raises:
        ValueError: one tensor under two names.
    """

    def __init__(self, folder: TensorFolder, canonical: Callable[[str], str | None]) -> None:
        self.folder = folder
        self.stored: dict[str, str] = {}
        self._read: set[str] = set()
        for stored in sorted(folder.files):
            name = canonical(stored)
            if name in self.stored:
                raise ValueError(f"{folder.path}: {self.stored[name]} and {stored} are the same tensor of this format")
            if name is not None:
                self.stored[name] = stored

    def get(self, name: str) -> Tensor:
        """One tensor.

        Raises:
            ValueError: it is missing.
        """
        self._read.add(name)
        return self.folder.get(self.stored.get(name, name))

    def finish(self, ignored: Iterable[str]) -> None:
        """Refuses what was neither read nor matches a pattern of ``ignored``.

        Raises:
            ValueError: names it.
        """
        known = {name for pattern in ignored for name in fnmatch.filter(self.stored, pattern)} | self._read
        unread = [stored for name, stored in self.stored.items() if name not in known]
        if unread:
            raise ValueError(f"{self.folder.path}: no place for {', '.join(unread[:5])} ({len(unread)} in all)")


class Layout(ABC):
    """One on-disk format of one architecture, both ways.

    Attributes:
        format: its word in ``lkspec export format=``; None is read only.
        draft_class: what it holds.
        loaded_by: the engines and versions that load it.
        vllm: vLLM's words for such a draft beside its target; None is not served so.
        sglang: SGLang's name of the algorithm; None is not served so.
        aliases: how a tensor's name, ours or of another writer, begins -> how this format spells it.
        ignored: patterns of tensors that are none of the draft's own.
        arguments: argument and attribute of the draft class -> its key in config.json (False where it is missing).
        fixed: arguments that the format leaves no choice of.
        required: keys that a config must have.
        only: config keys with the one value that the draft class computes.
        hidden_size: the config's key of the target's hidden size.
        any_vocabulary: its tensors are the same for every draft vocabulary.
    """

    format: ClassVar[str | None]
    draft_class: ClassVar[type[Draft]]
    loaded_by: ClassVar[str]
    vllm: ClassVar[Mapping[str, str] | None] = None
    sglang: ClassVar[str | None] = None
    aliases: ClassVar[Mapping[str, str]] = {"speculator.": "", "model.": ""}
    ignored: ClassVar[tuple[str, ...]] = ()
    arguments: ClassVar[Mapping[str, str]] = {}
    fixed: ClassVar[Mapping[str, str]] = {}
    required: ClassVar[tuple[str, ...]] = ()
    only: ClassVar[Mapping[str, Any]] = {}
    hidden_size: ClassVar[str] = "hidden_size"
    any_vocabulary: ClassVar[bool] = False

    @abstractmethod
    def recognises(self, folder: TensorFolder) -> bool:
        """Whether a checkpoint is of this format, by its config."""

    @abstractmethod
    def config(self, draft: Any, target: Target, options: WriteOptions) -> dict[str, Any]:
        """config.json without ``arguments`` and the weights' precision.

        Raises:
            ValueError: something that the format cannot express.
        """

    @abstractmethod
    def facts(self, folder: TensorFolder, draft: Any, target: Target) -> list[str]:
        """One sentence each of what ``checks`` found to be right."""

    def layer_config(self, folder: TensorFolder) -> dict[str, Any]:
        """The part of the config that holds sizes."""
        return folder.config

    def settings(self, folder: TensorFolder) -> dict[str, Any]:
        """The draft's arguments in the words of a run's configuration.

        Raises:
            ValueError: something that our class does not compute, or a key that is missing.
        """
        sizes = self.layer_config(folder)
        missing = [key for key in self.required if key not in sizes]
        if missing:
            raise ValueError(f"{folder.path}: config.json has no {', '.join(missing)}")
        config = {**folder.config, **sizes}
        for key, value in self.only.items():
            if config.get(key, value) not in (value, None):
                raise ValueError(
                    f"{folder.path}: config.json says {key}={config[key]!r}, but lkspec's draft of this kind has "
                    f"{key}={value!r}"
                )
        given = {ours: folder.config.get(theirs, False) for ours, theirs in self.arguments.items()}
        return {**given, **self.fixed}

    def check_target(self, folder: TensorFolder, target: Target) -> None:
        """Refuses a target whose states are not those that the draft reads.

        Raises:
            ValueError: says what to set.
        """
        sizes = self.layer_config(folder)
        for key, ours in ((self.hidden_size, target.spec.dims.hidden_size), ("vocab_size", target.vocab_size)):
            if sizes.get(key, ours) != ours:
                raise ValueError(f"{folder.path}: made for a target with {key} {sizes[key]}, {target.name} has {ours}")

    def row_ids(self, folder: TensorFolder, target_size: int) -> Int[Tensor, " D"]:
        """Target id of each row of the heads, in the checkpoint's own order."""
        return torch.arange(target_size)

    def canonical(self, name: str) -> str:
        """A tensor's name, ours or a stored one, as this format spells it."""
        return spelled(name, self.aliases)

    def reader(self, folder: TensorFolder) -> Reader:
        """The checkpoint's tensors of this format."""
        return Reader(folder, self.canonical)

    def theirs(self, name: str, draft: Any, config: Mapping[str, Any]) -> str:
        """The format's name of one of our tensors."""
        return self.canonical(name)

    def shared(self, draft: Any, config: Mapping[str, Any]) -> dict[str, Tensor]:
        """Tensors of the target that a checkpoint may repeat, by the format's names."""
        return {}

    def read(self, reader: Reader, name: str, draft: Any) -> Tensor:
        """One of our tensors."""
        return reader.get(self.theirs(name, draft, reader.folder.config))

    def tensors(self, folder: TensorFolder, draft: Any) -> dict[str, Tensor]:
        """The draft's tensors by our names, the vocabulary left out.

        Raises:
            ValueError: a tensor that is missing or has no place, or a copy that is not the target's.
        """
        reader, vocab = self.reader(folder), draft.vocab
        tensors = {name: self.read(reader, name, draft) for name in own_tensors(draft)}
        ids = self.row_ids(folder, vocab.target_size)
        for name, rows in tensors.items():
            if name.startswith("lm_head") and len(rows) >= len(ids):
                # Heads may have kept the rows that the vocabulary leaves out.
                tensors[name] = (rows[ids] if len(rows) > len(ids) else rows)[torch.argsort(ids)]
        for name, ours in self.shared(draft, folder.config).items():
            if name in reader.stored:
                copy = reader.get(name)
                if (len(copy), len(ours)) == (vocab.target_size, vocab.size):
                    copy = copy[vocab.ids.to(copy.device)]
                _same_as_target(folder, name, copy, ours)
        reader.finish(self.ignored)
        return tensors

    def stored(self, draft: Any, config: Mapping[str, Any]) -> dict[str, Tensor]:
        """What ``tensors`` reads, by the format's names."""
        return {self.theirs(name, draft, config): tensor for name, tensor in own_tensors(draft).items()}

    def write(self, folder: Path, draft: Draft, target: Target, options: WriteOptions) -> None:
        """Fills a folder.

        Raises:
            ValueError: something that the format cannot express.
        """
        assert self.format is not None
        config = {
            **self.config(draft, target, options),
            **{theirs: getattr(draft, ours) for ours, theirs in self.arguments.items()},
            "torch_dtype": dtype_name(options.dtype),
        }
        write_checkpoint(folder, self.stored(draft, config), config, options.dtype)

    def checks(self, folder: TensorFolder, draft: Draft, target: Target) -> list[str]:
        """Compares what was written with the draft and its target; one sentence each of what was found to be right.

        Raises:
            ValueError: a value that differs.
        """
        self.check_target(folder, target)
        if wrong := self.misdescribed(folder, draft):
            raise ValueError(f"{folder.path}: config.json does not describe the draft's {', '.join(wrong)}")
        if not torch.equal(self.row_ids(folder, target.vocab_size).sort().values, draft.vocab.ids.cpu()):
            raise ValueError(f"{folder.path}: the rows of its heads are not the tokens of the draft's vocabulary")
        return self.facts(folder, draft, target)

    def misdescribed(self, folder: TensorFolder, draft: Any) -> list[str]:
        """What the config says of the draft that is not so."""
        settings = self.settings(folder)
        return [name for name in self.arguments if settings[name] != getattr(draft, name)]

    def serve_commands(self, draft: Any, target_path: str, path: str, options: WriteOptions) -> list[ServeCommand]:
        """Commands of the engines that serve it; ``path`` is the export, ``target_path`` the target."""
        commands = []
        if self.vllm is not None:
            commands.append(vllm_command(self.vllm, target_path, options.num_draft_tokens, draft=path))
        if self.sglang is not None:
            commands.append(sglang_command(self.sglang, target_path, options.num_draft_tokens, draft=path))
        return commands


def spelled(name: str, aliases: Mapping[str, str]) -> str:
    """A name that begins with an alias, with what the alias stands for."""
    for alias, meant in aliases.items():
        if name.startswith(alias):
            name = meant + name.removeprefix(alias)
    return name


def own_tensors(draft: Draft) -> dict[str, Tensor]:
    """The draft's tensors, its vocabulary left out."""
    return {name: tensor for name, tensor in draft.state_dict().items() if name != "vocab.ids"}


def _same_as_target(folder: TensorFolder, name: str, copy: Tensor, ours: Tensor) -> None:
    """Checks a checkpoint's copy of a tensor that our drafts share with the target, to the precision of bfloat16."""
    # float16 copies have lost the smallest values, bfloat16 ones the last bits.
    if copy.shape != ours.shape or not torch.allclose(copy.to(ours.device).float(), ours.float(), 2**-7, 1e-6):
        raise ValueError(
            f"{folder.path}: {name} is not the target's own, but lkspec's drafts share that tensor with the target; "
            "was the checkpoint made for another target?"
        )


def as_saved(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors of their own on the CPU; floating-point ones are cast."""
    return {
        name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).detach().cpu().contiguous().clone()
        for name, tensor in tensors.items()
    }


def write_checkpoint(folder: Path, tensors: Mapping[str, Tensor], config: dict[str, Any], dtype: torch.dtype) -> None:
    """model.safetensors and config.json."""
    save_file(as_saved(tensors, dtype), folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", config)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """A config, index or record."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def dtype_name(dtype: torch.dtype) -> str:
    """As configs spell it."""
    return str(dtype).removeprefix("torch.")
