"""From tokenised conversations to the batches of each optimiser step, resumable at every step."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

import numpy as np
import torch
from jaxtyping import Int
from safetensors import safe_open
from safetensors.numpy import save_file
from torch.utils.data import DataLoader, Dataset, Sampler

from lkspec.data.chat import Encoded
from lkspec.data.planning import MicroBatch, Step, plan_batches
from lkspec.files import atomic_path
from lkspec.types import Batch

_MIN_SLOTS = 2  # a batch without any conversation still has an anchor and a next token


class EncodedStore:
    """Tokenised conversations in four bytes per token, so that data loader workers share them instead of copying.

    Attributes:
        num_bad_rows: left out on reading because they cannot be used.
        num_dropped: left out on reading, without an answer inside the length that is kept.
    """

    def __init__(self) -> None:
        self.num_bad_rows = self.num_dropped = 0
        self.ids: list[str] = []
        self.temperatures: list[float | None] = []
        self._tokens = array("i")
        self._turns = array("i")
        self._ends = [0]

    def append(self, encoded: Encoded) -> None:
        """Adds a conversation."""
        self.ids.append(encoded.id)
        self.temperatures.append(encoded.temperature)
        self._tokens.extend(encoded.tokens)
        self._turns.extend(encoded.turns)
        self._ends.append(len(self._tokens))

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[Encoded]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Encoded:
        span = slice(self._ends[index], self._ends[index + 1])
        return Encoded(
            self.ids[index], self._tokens[span].tolist(), self._turns[span].tolist(), self.temperatures[index]
        )

    @property
    def lengths(self) -> list[int]:
        """Tokens of each conversation."""
        return np.diff(self._ends).tolist()

    def supervised_tokens(self) -> Int[np.ndarray, " N"]:
        """Ids of all tokens inside assistant turns."""
        return np.asarray(self._tokens)[np.asarray(self._turns) > 0]

    def save(self, path: Path) -> None:
        """Writes it as a safetensors file."""
        tensors = {"tokens": self._tokens, "turns": self._turns}
        arrays = {name: np.asarray(values, dtype=np.int32) for name, values in tensors.items()}
        names = {"ids": json.dumps(self.ids), "temperatures": json.dumps(self.temperatures)}
        with atomic_path(path) as temporary:
            save_file({**arrays, "ends": np.asarray(self._ends)}, temporary, metadata=names)

    @classmethod
    def load(cls, path: Path) -> Self:
        """What ``save`` wrote."""
        store = cls()
        with safe_open(path, framework="numpy") as file:
            store._tokens.frombytes(file.get_tensor("tokens").tobytes())
            store._turns.frombytes(file.get_tensor("turns").tobytes())
            store._ends = file.get_tensor("ends").tolist()
            names = file.metadata()
        store.ids, store.temperatures = json.loads(names["ids"]), json.loads(names["temperatures"])
        return store

    def fingerprint(self) -> str:
        """16 hex digits of sha256 over ids, lengths, tokens and turns."""
        digest = hashlib.sha256("\0".join(self.ids).encode())
        for values in (self._ends, self._tokens, self._turns):
            digest.update(np.asarray(values, dtype="<i8").tobytes())
        return digest.hexdigest()[:16]


def collate(rows: Sequence[Sequence[Encoded]]) -> Batch:
    """A batch of rows, each of one or more conversations, padded on the right.

    Segments and turns count on through a row, so that no depth reaches over the border of two conversations;
    positions start at 0 in each conversation and run on through the padding, below the row's length.
    """
    width = max(_MIN_SLOTS, *(sum(len(encoded.tokens) for encoded in row) for row in rows))
    tokens, positions, segments, turns = (torch.zeros(len(rows), width, dtype=torch.int64) for _ in range(4))
    for b, row in enumerate(rows):
        start = length = last_turn = 0
        for segment, encoded in enumerate(row, start=1):
            length = len(encoded.tokens)
            span = slice(start, start + length)
            encoded_turns = torch.tensor(encoded.turns)
            tokens[b, span] = torch.tensor(encoded.tokens)
            positions[b, span] = torch.arange(length)
            segments[b, span] = segment
            turns[b, span] = torch.where(encoded_turns > 0, encoded_turns + last_turn, 0)
            last_turn += int(encoded_turns.max())
            start += length
        positions[b, start:] = torch.arange(length, length + width - start)
    return Batch(tokens, positions, segments, turns, tuple(tuple(encoded.id for encoded in row) for row in rows))


class StepSampler(Sampler[Step]):
    """The optimiser steps of this rank, and how far they were consumed.

    A step takes ``num_replicas * accumulate`` micro-batches of the epoch's plan; those left over at the end of an
    epoch are dropped (others in each epoch). ``set_epoch`` keeps the position when the epoch is the current one, which
    is how a resumed epoch goes on where it stopped.

    Raises:
        ValueError: too few micro-batches for one step; a state made with another seed or number of steps.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        max_tokens: int,
        seed: int,
        packed_length: int | None = None,
        num_replicas: int = 1,
        rank: int = 0,
        accumulate: int = 1,
    ) -> None:
        self._lengths = lengths
        self._max_tokens, self._packed_length = max_tokens, packed_length
        self.seed = seed
        self.epoch = 0
        self.step = 0
        self._epoch_offset = 0  # our number of an epoch minus the one that set_epoch calls it
        self._just_restored = False
        self._num_replicas, self._rank, self._accumulate = num_replicas, rank, accumulate
        num_batches = len(self._plan(0))
        self._num_steps = num_batches // (num_replicas * accumulate)
        if self._num_steps == 0:
            raise ValueError(
                f"the {len(lengths)} conversations make {num_batches} micro-batches, but one step takes {num_replicas} "
                f"ranks * data.accumulate={accumulate}: lower data.max_tokens or data.accumulate, or add conversations"
            )

    def _plan(self, epoch: int) -> list[MicroBatch]:
        return plan_batches(
            self._lengths,
            max_tokens=self._max_tokens,
            seed=self.seed,
            epoch=epoch,
            packed_length=self._packed_length,
        )

    def __len__(self) -> int:
        """Steps of a whole epoch, wherever in it the sampler stands."""
        return self._num_steps

    def __iter__(self) -> Iterator[Step]:
        batches = self._plan(self.epoch)
        size = self._num_replicas * self._accumulate
        for step in range(self.step, self._num_steps):
            yield batches[step * size : (step + 1) * size][self._rank :: self._num_replicas]

    def advance(self) -> None:
        """Notes that one more step was consumed; after the last one of an epoch the next epoch begins."""
        self._just_restored = False
        self.step += 1
        if self.step == self._num_steps:
            self.epoch, self.step = self.epoch + 1, 0

    def set_epoch(self, epoch: int) -> None:
        """Goes to the start of an epoch, unless it is the current one."""
        if self._just_restored and self.step == 0:
            # Resumed between two epochs, Lightning announces an epoch that takes no step: the old one (saved during
            # its last validation) or, under max_steps, one more after it. Ours is the next to be read either way.
            self._epoch_offset = self.epoch - epoch
        elif epoch + self._epoch_offset != self.epoch:
            self.epoch, self.step = epoch + self._epoch_offset, 0

    def state_dict(self) -> dict[str, int]:
        """Where the next step lies."""
        return {
            "epoch": self.epoch,
            "step": self.step,
            "epoch_offset": self._epoch_offset,
            "seed": self.seed,
            "num_steps": self._num_steps,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes to a saved place."""
        expected = {"seed": self.seed, "num_steps": self._num_steps}
        given = {name: state[name] for name in expected}
        if given != expected and state["step"] > 0:
            raise ValueError(
                f"the checkpoint stands inside an epoch of data with {given}, but now {expected}: resume with the same "
                "data, data.seed, data.max_tokens, data.accumulate and number of devices"
            )
        self.epoch, self.step, self._epoch_offset = state["epoch"], state["step"], state["epoch_offset"]
        self._just_restored = True


class _Steps(Dataset[list[Batch]]):
    def __init__(self, store: EncodedStore) -> None:
        self._store = store

    def __getitem__(self, step: Step) -> list[Batch]:
        return [collate([[self._store[index] for index in row] for row in batch]) for batch in step]


class BatchLoader(DataLoader[list[Batch]]):
    """Yields the micro-batches of one step after another, made in ``num_workers`` worker processes (0: in this one)."""

    def __init__(self, store: EncodedStore, steps: Sampler[Step] | list[Step], *, num_workers: int = 0) -> None:
        super().__init__(
            _Steps(store),
            batch_size=None,  # an item of the data set is a step already
            sampler=steps,
            collate_fn=list,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
        )


class StepLoader(BatchLoader):
    """Yields the micro-batches of one optimiser step on this rank after another.

    Its state counts the steps that the consumer received, not those that workers prepared ahead. Lightning finds
    ``state_dict``, ``load_state_dict`` and ``sampler.set_epoch`` by themselves. The iterator starts lazily, because
    Lightning creates it before it restores the state and sets the epoch.
    """

    sampler: StepSampler

    def __iter__(self) -> Iterator[list[Batch]]:  # type: ignore[override]
        for batches in super().__iter__():
            self.sampler.advance()
            yield batches

    def state_dict(self) -> dict[str, int]:
        """Where the next step lies."""
        return self.sampler.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes to a saved place."""
        self.sampler.load_state_dict(state)
