"""How the target's states of a data set lie on disk (written and read by ``captured.py``).

A capture is a folder::

    manifest.json            what the states are of (``capture_identity``) and the shards that count
    shard-00000.safetensors  a tensor [L, AH + H + 4] in bfloat16 for each conversation
    .lock                    held by the one writer

A token's row has its auxiliary states, low to high, its last state, and in the bits of the last four columns a summary
of the logits of that last state, as it is stored, over the whole vocabulary: log_normaliser (float32), argmax (int32).
With them a draft over part of the vocabulary trains without the products with the rest of the target's head.

It takes ``2 (A + 1) H + 8`` bytes per token: 4,616 for SmolLM2-135M (A = 3, H = 576), 32,776 at H = 4,096.

The states of a conversation depend on the target and its tokens alone, so its tensor is named by ``text_key``: ids may
change, a run may use any part of what was captured, and a capture can be added to. Other data are therefore refused by
the conversation (``CapturedStates.check``); the data fingerprints in the manifest only say where it all comes from.

Checksums form a chain over every byte: the manifest has the size of each shard and the sha256 of its header, the header
has the sha256 of each conversation. A conversation is checked the first time a process reads it, so that opening a
capture of any size costs no more than reading its headers.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from lkspec.files import atomic_path, write_text
from lkspec.targets.base import Target
from lkspec.types import HeadSummary, TargetStates

DTYPE = torch.bfloat16
MANIFEST = "manifest.json"
_FORMAT = 2
_SUMMARY_COLUMNS = 4
_LENGTH_BYTES = 8  # a safetensors file: length of the header in 8 bytes, the header in JSON, the data


class DamagedShardError(ValueError):
    """A shard is missing or does not have the bytes that were written."""

    def __init__(self, path: Path, what: str) -> None:
        super().__init__(
            f"{path} is damaged: {what}. Run the `lkspec capture` command of {path.parent} again: it replaces the "
            "damaged shards and keeps the others"
        )


def capture_identity(target: Target) -> dict[str, str]:
    """What a target's states and the tokens they belong to depend on, each part as text to compare."""
    tokenizer = json.loads(target.tokenizer.backend_tokenizer.to_str())
    for setting in ("truncation", "padding"):  # of the last call, not of the tokenizer
        del tokenizer[setting]
    return {
        "target": target.fingerprint,
        "dtype": str(target.dtype).removeprefix("torch."),
        "aux_layer_ids": ", ".join(map(str, target.aux_layer_ids)),
        "tokenizer": _digest(json.dumps(tokenizer, sort_keys=True).encode())[:16],
        "chat_template": _digest(json.dumps(target.tokenizer.chat_template, sort_keys=True).encode())[:16],
    }


def bytes_per_token(target: Target) -> int:
    """Bytes that a capture takes for each token."""
    return ((target.spec.num_aux + 1) * target.spec.dims.hidden_size + _SUMMARY_COLUMNS) * DTYPE.itemsize


@dataclass(frozen=True)
class Shard:
    """A finished shard; ``header_bytes`` counts the header with its length in front."""

    file: str
    num_bytes: int
    header_bytes: int
    header_sha256: str
    num_conversations: int
    num_tokens: int


@dataclass(frozen=True)
class Manifest:
    """What a capture holds.

    Attributes:
        identity: see ``capture_identity``.
        columns: of each tensor: how many are auxiliary states, how many the last state.
        data: fingerprints of the data sets that were captured into the folder.
        shards: those that count; other files are what a kill left behind.
    """

    identity: dict[str, str]
    columns: dict[str, int]
    data: tuple[str, ...] = ()
    shards: tuple[Shard, ...] = ()

    @classmethod
    def of(cls, target: Target) -> Self:
        """An empty capture."""
        hidden_size = target.spec.dims.hidden_size
        return cls(capture_identity(target), {"aux": target.spec.num_aux * hidden_size, "last": hidden_size})

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Reads a folder's manifest.

        Raises:
            ValueError: there is none, or not one of this format.
        """
        file = folder / MANIFEST
        if not file.is_file():
            raise ValueError(f"{folder} holds no capture (no {MANIFEST}): make one by `lkspec capture out={folder}`")
        try:
            content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            known = content["format"] == _FORMAT and content["dtype"] == str(DTYPE)
        except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError):
            known = False
        if not known:
            raise ValueError(f"{file} is damaged or of another version of lkspec: capture again with overwrite=true")
        shards = tuple(Shard(**shard) for shard in content["shards"])
        return cls(content["identity"], content["columns"], tuple(content["data"]), shards)

    def save(self, folder: Path) -> None:
        """Replaces a folder's manifest."""
        content = {"format": _FORMAT, "dtype": str(DTYPE), **asdict(self)}
        write_text(folder / MANIFEST, json.dumps(content, indent=1) + "\n")

    def check_identity(self, folder: Path, target: Target, remedy: str) -> None:
        """Refuses a capture made for something else.

        Raises:
            ValueError: names every part of the identity that differs, with both values.
        """
        now = capture_identity(target)
        differing = [
            f"{part}: captured {self.identity[part]}, now {now[part]}"
            for part in now
            if self.identity[part] != now[part]
        ]
        if differing:
            raise ValueError(f"{folder} was captured for something else ({'; '.join(differing)}): {remedy}")


def pack(states: TargetStates) -> Float[Tensor, "L C"]:
    """A conversation's tensor, from its states [L, AH] and [L, H] and their summary [L]."""
    assert states.summary is not None
    normaliser, argmax = states.summary.log_normaliser.float(), states.summary.argmax.int()
    bits = torch.stack([normaliser.view(torch.int32), argmax], dim=-1).cpu().view(torch.int16)
    columns = (part.to(DTYPE).cpu().view(torch.int16) for part in (states.aux, states.last))
    return torch.cat([*columns, bits], dim=-1).view(DTYPE)  # as integers, lest arithmetic tidies a NaN's bits


def unpack(tensor: Float[Tensor, "L C"], columns: dict[str, int]) -> TargetStates:
    """The states and their summary in a conversation's tensor, whose ``columns`` the manifest names."""
    aux, last, bits = tensor.split([columns["aux"], columns["last"], _SUMMARY_COLUMNS], dim=-1)
    normaliser, argmax = bits.contiguous().view(torch.int32).unbind(-1)
    return TargetStates(aux, last, HeadSummary(normaliser.contiguous().view(torch.float32), argmax.long()))


class Entry(NamedTuple):
    """Where a conversation's tensor lies."""

    path: Path
    offset: int
    shape: tuple[int, int]
    sha256: str


def write_shard(path: Path, tensors: dict[str, Float[Tensor, "L C"]]) -> Shard:
    """Writes conversations by their ``text_key``, atomically."""
    digests = {key: _digest(tensor.view(torch.uint8).flatten().numpy()) for key, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata=digests)
    with path.open("rb") as file:
        length = file.read(_LENGTH_BYTES)
        header = length + file.read(int.from_bytes(length, "little"))
    num_tokens = sum(len(tensor) for tensor in tensors.values())
    return Shard(path.name, path.stat().st_size, len(header), _digest(header), len(tensors), num_tokens)


def read_header(folder: Path, shard: Shard) -> dict[str, Entry]:
    """The conversations of a shard by their ``text_key``.

    Raises:
        DamagedShardError: the file is missing, of another size, or its header is not the one that was written.
    """
    path = folder / shard.file
    if not path.is_file():
        raise DamagedShardError(path, "the file is missing")
    if path.stat().st_size != shard.num_bytes:
        raise DamagedShardError(path, f"expected {shard.num_bytes:,} bytes, found {path.stat().st_size:,}")
    with path.open("rb") as file:
        header = file.read(shard.header_bytes)
    if _digest(header) != shard.header_sha256:
        raise DamagedShardError(path, "its header does not have the sha256 that the manifest names")
    tensors = json.loads(header[_LENGTH_BYTES:])
    digests = tensors.pop("__metadata__")
    return {
        key: Entry(path, shard.header_bytes + tensor["data_offsets"][0], tuple(tensor["shape"]), digests[key])
        for key, tensor in tensors.items()
    }


def read_tensor(entry: Entry, *, check: bool) -> Float[Tensor, "L C"]:
    """A conversation; ``check`` compares its sha256.

    Raises:
        DamagedShardError: other bytes than those that were written.
    """
    # Plainly read, not mapped: the checksum needs all bytes anyway, and a mapped file that shrinks ends the process.
    num_tokens, width = entry.shape
    data = bytearray(num_tokens * width * DTYPE.itemsize)
    with entry.path.open("rb") as file:
        file.seek(entry.offset)
        num_read = file.readinto(data)
    if num_read != len(data) or (check and _digest(data) != entry.sha256):
        raise DamagedShardError(entry.path, "a conversation does not have the sha256 that the shard's header names")
    return torch.frombuffer(data, dtype=DTYPE).view(entry.shape)


def _digest(data: Any) -> str:
    return hashlib.sha256(data).hexdigest()
