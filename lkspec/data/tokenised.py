"""Conversations of a path, tokenised: read from the cache, or encoded one by one."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from lkspec.data.chat import encode_conversation
from lkspec.data.conversations import BadRows, OnBadRow, read_conversations
from lkspec.data.dataset import EncodedStore
from lkspec.data.token_cache import TokenCache

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tokenised:
    """The conversations of a path, without those that have no supervised token left.

    Attributes:
        num_bad_rows: left out for a reason of their own.
        num_dropped: without an answer inside the length that is kept.
    """

    store: EncodedStore
    num_bad_rows: int = 0
    num_dropped: int = 0


def read_tokenised(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    eos_ids: tuple[int, ...],
    on_bad_row: OnBadRow = "error",
) -> Tokenised:
    """Reads and tokenises a path; what is left out is counted, and said in the log.

    Args:
        path: as ``read_conversations`` takes it.
        tokenizer, max_length, eos_ids: as in ``encode_conversation``.
        on_bad_row: "error" or "skip".

    Raises:
        ValueError: as ``read_conversations`` and ``encode_conversation``; no conversation left with an answer.
    """
    cache = TokenCache(path, tokenizer, max_length=max_length, eos_ids=eos_ids)
    if (known := cache.load()) is not None:
        return Tokenised(known)
    read = read_conversations(path, on_bad_row=on_bad_row)
    store, bad_rows, num_dropped = EncodedStore(), BadRows(on_bad_row), 0
    for conversation in read.conversations:
        try:
            one = encode_conversation(tokenizer, conversation, max_length=max_length, eos_ids=eos_ids)
        except ValueError as error:
            bad_rows.add(path, str(error))
            continue
        if one.num_supervised:
            store.append(one)
        else:
            num_dropped += 1
    cut = f"{num_dropped} conversations have no answer within data.max_length={max_length}"
    if len(store) == 0:
        raise ValueError(f"{path}: none of {len(read.conversations)} is left: {cut}, {bad_rows.summary()}")
    if bad_rows.count:
        log.warning("%s: %s", path, bad_rows.summary())
    if num_dropped:
        log.warning("%s: %s", path, cut)
    num_bad_rows = read.bad_rows.count + bad_rows.count
    if not (num_bad_rows or num_dropped):  # what is left out must be said in every run
        cache.save(store)
    return Tokenised(store, num_bad_rows, num_dropped)
