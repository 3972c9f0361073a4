"""The data of a run: reads, tokenises, splits and batches conversations for the trainer."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Int
from lightning import LightningDataModule
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lkspec.data.conversations import OnBadRow
from lkspec.data.dataset import BatchLoader, EncodedStore, StepLoader, StepSampler
from lkspec.data.planning import plan_evaluation
from lkspec.data.tokenised import EncodedData, read_tokenised
from lkspec.types import Batch


class SpeculatorDataModule(LightningDataModule):
    """Conversations as batches of tokens with their assistant turns marked.

    Call ``bind`` with the target's tokenizer, then ``adopt`` what ``read`` gives.

    Args:
        train: where the training conversations lie (see ``read_conversations``).
        validation: where validation conversations lie, one path or several.
        max_length: tokens kept of each conversation.
        max_tokens: padded area of a micro-batch (rows * longest row).
        accumulate: micro-batches per optimiser step and rank; they are yielded together.
        pack: whether rows of ``max_length`` hold several training conversations.
        num_workers: processes that make batches.
        seed: of the order of training.
        on_bad_row: "error" or "skip".
        val_fraction: share of the training conversations held out, to be validated on beside ``validation``.
        split_seed: of that split; apart from ``seed``, so that runs with different seeds share their validation set.
        limit_conversations: train on only so many conversations, evenly spaced over the data: files are often sorted
            by domain. The draft vocabulary is still counted over all of them.

    Raises:
        ValueError: sizes that contradict each other, or a share or limit out of range.
    """

    def __init__(
        self,
        *,
        train: str,
        validation: str | Sequence[str] | None = None,
        max_length: int = 2048,
        max_tokens: int = 8192,
        accumulate: int = 1,
        pack: bool = False,
        num_workers: int = 0,
        seed: int = 0,
        on_bad_row: OnBadRow = "error",
        val_fraction: float = 0.0,
        split_seed: int = 0,
        limit_conversations: int | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= max_length <= max_tokens:
            raise ValueError(
                f"expected 1 <= data.max_length <= data.max_tokens, since a micro-batch must hold the longest "
                f"conversation; got {max_length} and {max_tokens}"
            )
        if accumulate < 1:
            raise ValueError(f"data.accumulate: expected a number >= 1, got {accumulate}")
        if not 0 <= val_fraction < 1:
            raise ValueError(f"data.val_fraction: expected a share in [0, 1), got {val_fraction}")
        if limit_conversations is not None and limit_conversations < 1:
            raise ValueError(f"data.limit_conversations: expected a number >= 1 or null, got {limit_conversations}")
        self._train_path = train
        self._validation_paths = [validation] if isinstance(validation, str) else list(validation or [])
        self.max_length, self.max_tokens, self.accumulate, self.pack = max_length, max_tokens, accumulate, pack
        self.num_workers, self.seed, self.on_bad_row = num_workers, seed, on_bad_row
        self._val_fraction, self._split_seed, self._limit = val_fraction, split_seed, limit_conversations
        #: All that ``read`` depends on besides the target: data modules that agree in it may share what it gives.
        self.read_settings = [train, self._validation_paths, max_length, on_bad_row, val_fraction, split_seed]
        # A rank without a validation conversation takes part with an empty batch.
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._eos_ids: tuple[int, ...] = ()
        self._train: EncodedStore | None = None
        self._encoded: EncodedData | None = None

    def bind(self, tokenizer: PreTrainedTokenizerBase, *, eos_ids: tuple[int, ...], max_positions: int) -> None:
        """Takes the target's tokenizer, end-of-turn tokens and context limit.

        Raises:
            ValueError: ``max_length`` is beyond the target's context.
        """
        if self.max_length > max_positions:
            raise ValueError(
                f"data.max_length={self.max_length} is beyond the target's context: set it to at most {max_positions}"
            )
        self._tokenizer, self._eos_ids = tokenizer, eos_ids

    def adopt(self, encoded: EncodedData) -> None:
        """Takes what ``read`` gives, or gave to a data module of the same files, lengths and split."""
        self._encoded = encoded
        self._train = _evenly_spaced(encoded.train, self._limit)

    def read(self) -> EncodedData:
        """Everything, tokenised.

        Raises:
            ValueError: as ``read_conversations`` and ``encode_conversation``; no conversation left with an answer.
        """
        assert self._tokenizer is not None, "call bind(...) first"
        everything, *others = (
            read_tokenised(
                path, self._tokenizer, max_length=self.max_length, eos_ids=self._eos_ids, on_bad_row=self.on_bad_row
            )
            for path in (self._train_path, *self._validation_paths)
        )
        encoded = EncodedData()
        for one in everything:
            held_out = is_held_out(one.id, fraction=self._val_fraction, seed=self._split_seed)
            (encoded.validation if held_out else encoded.train).append(one)
        if self._val_fraction and not 0 < len(encoded.train) < len(everything):
            raise ValueError(
                f"data.val_fraction={self._val_fraction} holds out {len(encoded.validation)} of {len(everything)} "
                "conversations: change it, or name a validation set"
            )
        for one in itertools.chain(*others):
            encoded.validation.append(one)
        for store in (everything, *others):
            encoded.num_bad_rows += store.num_bad_rows
            encoded.num_dropped += store.num_dropped
        return encoded

    def train_dataloader(self) -> StepLoader:
        """Optimiser steps of this rank, each a list of ``accumulate`` batches."""
        store = self.train_set
        sampler = StepSampler(
            store.lengths,
            max_tokens=self.max_tokens,
            seed=self.seed,
            packed_length=self.max_length if self.pack else None,
            num_replicas=self._num_replicas,
            rank=self._rank,
            accumulate=self.accumulate,
        )
        return StepLoader(store, sampler, num_workers=self.num_workers)

    @property
    def val_temperatures(self) -> list[float | None]:
        """Temperatures of the validation text, in the order of ``val_dataloader``; None is text of unknown origin."""
        known = set(self.validation_set.temperatures)
        return [*sorted(t for t in known if t is not None), *([None] if None in known else [])]

    def val_dataloader(self) -> list[BatchLoader]:
        """A loader per temperature: every conversation once over all ranks, in a fixed order, one batch per step."""
        store, loaders = self.validation_set, []
        for temperature in self.val_temperatures:
            chosen = [index for index, known in enumerate(store.temperatures) if known == temperature]
            steps = plan_evaluation(
                store.lengths, chosen, max_tokens=self.max_tokens, num_replicas=self._num_replicas, rank=self._rank
            )
            loaders.append(BatchLoader(store, steps, num_workers=self.num_workers))
        return loaders

    def transfer_batch_to_device(self, batch: list[Batch], device: torch.device, dataloader_idx: int) -> list[Batch]:
        """Leaves a step's micro-batches where they are: the module moves them one by one."""
        return batch

    def token_counts(self, vocab_size: int) -> Int[Tensor, " V"]:
        """How often each token is supervised in all conversations of the training data, beyond the limit too.

        Raises:
            ValueError: the tokenizer made a token that the target's vocabulary does not have.
        """
        counts = np.bincount(self.encoded.train.supervised_tokens(), minlength=vocab_size)
        if counts.size > vocab_size:
            raise ValueError(
                f"the conversations hold the token {counts.size - 1}, but the target's vocabulary has {vocab_size}: "
                "its tokenizer belongs to another model"
            )
        return torch.from_numpy(counts)

    @property
    def fingerprint(self) -> str:
        """16 hex digits of sha256 over the training conversations' ids, tokens and turns."""
        return self.train_set.fingerprint()

    @property
    def num_supervised_tokens(self) -> int:
        """Supervised tokens of the training conversations."""
        return int(self.train_set.supervised_tokens().size)

    @property
    def train_set(self) -> EncodedStore:
        """The training conversations."""
        assert self._train is not None, "call adopt(...) first"
        return self._train

    @property
    def validation_set(self) -> EncodedStore:
        """The validation conversations; may be empty."""
        return self.encoded.validation

    @property
    def encoded(self) -> EncodedData:
        """Everything that was read."""
        assert self._encoded is not None, "call adopt(...) first"
        return self._encoded

    @property
    def _num_replicas(self) -> int:
        return 1 if self.trainer is None else int(self.trainer.world_size)

    @property
    def _rank(self) -> int:
        return 0 if self.trainer is None else int(self.trainer.global_rank)


def _evenly_spaced(store: EncodedStore, count: int | None) -> EncodedStore:
    if count is None or count >= len(store):
        return store
    chosen = EncodedStore()
    for index in range(count):
        chosen.append(store[index * len(store) // count])
    return chosen


def is_held_out(conversation_id: str, *, fraction: float, seed: int) -> bool:
    """Whether a conversation belongs to the validation split: by its own id, so that other rows do not matter."""
    digest = hashlib.sha256(f"{seed}:{conversation_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64
