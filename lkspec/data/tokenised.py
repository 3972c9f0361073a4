"""Conversations as tokens: those of a path, read from the cache or encoded one by one, and those of a run."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase

from lkspec.data.chat import encode_conversation
from lkspec.data.conversations import BadRows, OnBadRow, read_conversations
from lkspec.data.dataset import EncodedStore, collate
from lkspec.data.planning import MicroBatch, plan_evaluation
from lkspec.data.sources import local_files
from lkspec.files import cache_dir, sha256_of
from lkspec.types import Batch, text_key

log = logging.getLogger(__name__)

_COMPANY_TOKENS = 16_384  # padded: what fills a GPU
_MIN_CACHED = 1000  # fewer conversations are tokenised again; at 3 ms each, many would take half an hour in each run
_CODE = ("chat.py", "conversations.py", "dataset.py", "sources.py")  # what a tokenised conversation depends on


def read_tokenised(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    eos_ids: tuple[int, ...],
    on_bad_row: OnBadRow = "error",
) -> EncodedStore:
    """Reads and tokenises a path, without conversations that have no supervised token left.

    What is left out is counted, and said in the log.

    Args:
        path: as ``read_conversations`` takes it.
        tokenizer, max_length, eos_ids: as in ``encode_conversation``.
        on_bad_row: "error" or "skip".

    Raises:
        ValueError: as ``read_conversations`` and ``encode_conversation``; no conversation left with an answer.
    """
    cached = cache_file(path, tokenizer, max_length=max_length, eos_ids=eos_ids)
    if cached is not None and cached.is_file():
        with suppress(SafetensorError):  # a damaged file is made again
            return EncodedStore.load(cached)
    bad_rows, store = BadRows(on_bad_row), EncodedStore()
    conversations = read_conversations(path, bad_rows)
    for conversation in conversations:
        try:
            one = encode_conversation(tokenizer, conversation, max_length=max_length, eos_ids=eos_ids)
        except ValueError as error:
            bad_rows.add(path, str(error))
            continue
        if one.num_supervised:
            store.append(one)
        else:
            store.num_dropped += 1
    store.num_bad_rows = bad_rows.count
    cut = f"{store.num_dropped} conversations have no answer within data.max_length={max_length}"
    if len(store) == 0:
        raise ValueError(f"{path}: none of {len(conversations)} is left: {cut}, {bad_rows.summary()}")
    if bad_rows.count:
        log.warning("%s: %s", path, bad_rows.summary())
    if store.num_dropped:
        log.warning("%s: %s", path, cut)
    # What is left out must be said in every run.
    if cached is not None and len(store) >= _MIN_CACHED and not (bad_rows.count or store.num_dropped):
        store.save(cached)
    return store


def cache_file(
    path: str, tokenizer: PreTrainedTokenizerBase, *, max_length: int, eos_ids: tuple[int, ...]
) -> Path | None:
    """Where the tokens of a path are kept: by the contents of its files, the tokenizer, the settings and our own code.

    None for hub data sets, for made-up ones and for slow tokenizers.
    """
    files = local_files(path)
    if not files or not tokenizer.is_fast:
        return None
    depends = {
        "files": [(file.stem, sha256_of(file)) for file in files],
        "code": [sha256_of(Path(__file__).with_name(name)) for name in _CODE],
        "tokenizer": [tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template],
        "settings": [max_length, list(eos_ids)],
    }
    digest = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()
    return cache_dir() / "tokenised" / f"{digest[:32]}.safetensors"


@dataclass
class EncodedData:
    """A run's conversations: those to train on, beyond a limit on their number too, and the held-out ones.

    Attributes:
        num_bad_rows, num_dropped: as in ``EncodedStore``, of everything that was read.
    """

    train: EncodedStore = field(default_factory=EncodedStore)
    validation: EncodedStore = field(default_factory=EncodedStore)
    num_bad_rows: int = 0
    num_dropped: int = 0

    def company(self, max_tokens: int = _COMPANY_TOKENS) -> Callable[[str], Batch | None]:
        """By a conversation's ``text_key``, the batch of conversations about as long in which a GPU always reads it."""
        batches: dict[str, tuple[EncodedStore, MicroBatch]] = {}
        for store in (self.train, self.validation):
            limit = max([max_tokens, *store.lengths])
            steps = plan_evaluation(store.lengths, range(len(store)), max_tokens=limit, num_replicas=1, rank=0)
            for (batch,) in steps:
                batches |= {text_key(torch.tensor(store[index].tokens)): (store, batch) for (index,) in batch}

        def company_of(key: str) -> Batch | None:
            store, batch = batches.get(key, (None, []))
            return None if store is None else collate([[store[index] for index in row] for row in batch])

        return company_of
