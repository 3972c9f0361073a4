"""The target's states of a data set on disk: ``lkspec capture`` writes them once, training reads them from there.

What lies there, and how other states and damage are noticed: ``capture_format.py``.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from lkspec.data.capture_format import (
    DTYPE,
    MANIFEST,
    DamagedShardError,
    Entry,
    Manifest,
    Shard,
    pack,
    read_header,
    read_tensor,
    unpack,
    write_shard,
)
from lkspec.data.dataset import EncodedStore
from lkspec.targets.base import Target
from lkspec.types import Batch, BatchConversation, TargetStates, text_key

_NAMES_SHOWN = 3
_NUM_READERS = 8  # threads


def store_keys(store: EncodedStore) -> Iterator[str]:
    """The ``text_key`` of each conversation, in order."""
    return (text_key(torch.tensor(encoded.tokens)) for encoded in store)


class CapturedStates:
    """The target's states of a batch, read from a capture.

    They are those of each conversation by itself, rounded to bfloat16, in the target's dtype and on its device; zero in
    padding.

    Raises:
        ValueError: no capture; one of another target, dtype, auxiliary layers, tokenizer or chat template; a damaged
            shard (also later, when a conversation of it is first read).
    """

    def __init__(self, folder: Path, target: Target) -> None:
        self.folder = folder
        self._manifest = Manifest.load(folder)
        self._manifest.check_identity(folder, target, "train with what it was made for, or capture into another folder")
        self._device, self._dtype = target.device, target.dtype
        self._entries: dict[str, Entry] = {}
        for shard in self._manifest.shards:
            self._entries |= read_header(folder, shard)
        self._checked: set[str] = set()
        # Reading and hashing leave Python's lock: one thread would not keep up with a draft on a fast device.
        self._readers = ThreadPoolExecutor(_NUM_READERS)

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def check(self, *stores: EncodedStore) -> None:
        """Looks all conversations of a run up.

        Raises:
            ValueError: some were not captured; says how many and names the first.
        """
        missing = [
            store.ids[index] for store in stores for index, key in enumerate(store_keys(store)) if key not in self
        ]
        if missing:
            total = sum(len(store) for store in stores)
            raise ValueError(self._missing(missing, f"{len(missing)} of the {total} conversations of this run"))

    def _missing(self, names: list[str], which: str) -> str:
        shown = ", ".join(names[:_NAMES_SHOWN]) + (", ..." if len(names) > _NAMES_SHOWN else "")
        return (
            f"{self.folder} lacks {which} ({shown}), it was captured from the data {', '.join(self._manifest.data)}: "
            f"run `lkspec capture out={self.folder}` with this run's data settings, it adds what is missing"
        )

    def __call__(self, batch: Batch) -> TargetStates:
        columns = self._manifest.columns
        if any(batch.ids):
            conversations = list(batch.conversations())
            parts = zip(conversations, self._readers.map(self._conversation, conversations), strict=True)
            states = TargetStates.of_conversations(batch, parts)
        else:  # a rank that has run out validates a batch without any text
            aux, last = (torch.zeros(*batch.tokens.shape, columns[name], dtype=DTYPE) for name in ("aux", "last"))
            states = TargetStates(aux=aux, last=last)
        states = states.to(self._device)  # as bfloat16, all conversations together
        return replace(states, aux=states.aux.to(self._dtype), last=states.last.to(self._dtype))

    def _conversation(self, conversation: BatchConversation) -> TargetStates:
        key = conversation.key
        if key not in self._entries:
            raise ValueError(self._missing([conversation.name], "a conversation"))
        tensor = read_tensor(self._entries[key], check=key not in self._checked)
        self._checked.add(key)
        return unpack(tensor, self._manifest.columns)


class CaptureWriter:
    """Adds conversations to a capture, a shard at a time; made by ``capture_writer``.

    A kill loses the conversations since the last shard: a shard counts once the manifest names it.

    Attributes:
        repaired: what was wrong with the shards that were dropped at the start.
    """

    def __init__(self, folder: Path, manifest: Manifest, *, shard_bytes: int) -> None:
        self._folder = folder
        self._shard_bytes = shard_bytes
        self._tensors: dict[str, Float[Tensor, "L C"]] = {}
        self._num_bytes = 0
        self._keys: set[str] = set()
        self.repaired: list[str] = []
        intact = []
        for shard in manifest.shards:
            try:
                self._keys |= _checked_keys(folder, shard)
                intact.append(shard)
            except DamagedShardError as error:
                self.repaired.append(str(error))
        self.manifest = replace(manifest, shards=tuple(intact))
        self._remove_strays()

    def _remove_strays(self) -> None:
        counted = {shard.file for shard in self.manifest.shards}
        for pattern in ("shard-*.safetensors", ".shard-*.tmp", f".{MANIFEST}.*.tmp"):
            for path in self._folder.glob(pattern):
                if path.name not in counted:
                    path.unlink()

    def __contains__(self, key: str) -> bool:
        return key in self._keys

    def add(self, key: str, states: TargetStates) -> None:
        """Takes the states [L, AH] and [L, H] of one conversation and their summary, named by its ``text_key``."""
        tensor = pack(states)
        self._tensors[key] = tensor
        self._keys.add(key)
        self._num_bytes += tensor.nbytes
        if self._num_bytes >= self._shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Writes what was added since the last shard, then the manifest."""
        if self._tensors:
            shards = self.manifest.shards
            number = 1 + max((int(Path(shard.file).stem.partition("-")[2]) for shard in shards), default=-1)
            shard = write_shard(self._folder / f"shard-{number:05d}.safetensors", self._tensors)
            self.manifest = replace(self.manifest, shards=(*shards, shard))
            self._tensors, self._num_bytes = {}, 0
        self.manifest.save(self._folder)


@contextmanager
def capture_writer(
    folder: Path, target: Target, *, data: str, shard_bytes: int = 256_000_000, overwrite: bool = False
) -> Iterator[CaptureWriter]:
    """Opens a capture for adding to it; what a killed writer left is removed, damaged shards are dropped.

    Args:
        folder: made when it is not there.
        target: whose states will be added.
        data: fingerprint of the data set they are of.
        shard_bytes: a shard is written once it holds so many; so much memory is needed twice.
        overwrite: drop what the folder holds.

    Raises:
        ValueError: another process writes there; the folder holds states of another target, dtype, auxiliary layers,
            tokenizer or chat template.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder}: another process is capturing into it; wait for its end, or stop it") from None
        if overwrite:
            (folder / MANIFEST).unlink(missing_ok=True)
        if (folder / MANIFEST).exists():
            manifest = Manifest.load(folder)
            manifest.check_identity(folder, target, "name another folder in out=..., or drop it with overwrite=true")
        else:
            manifest = Manifest.of(target)
        manifest = replace(manifest, data=tuple(dict.fromkeys((*manifest.data, data))))
        writer = CaptureWriter(folder, manifest, shard_bytes=shard_bytes)
        yield writer
        writer.flush()


def _checked_keys(folder: Path, shard: Shard) -> set[str]:
    """What a shard holds, every byte checked."""
    entries = read_header(folder, shard)
    for entry in entries.values():
        read_tensor(entry, check=True)
    return set(entries)
