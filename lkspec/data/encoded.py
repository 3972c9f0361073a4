"""A run's tokenised conversations, and in which company the target reads each on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from lkspec.data.dataset import EncodedStore, collate
from lkspec.data.planning import MicroBatch, plan_evaluation
from lkspec.types import Batch, text_key

_COMPANY_TOKENS = 16_384  # padded: what fills a GPU


@dataclass
class EncodedData:
    """Tokenised conversations: those to train on, beyond a limit on their number too, and the held-out ones.

    Attributes:
        num_bad_rows: left out for a reason of their own.
        num_dropped: without an answer inside the length that is kept.
    """

    train: EncodedStore = field(default_factory=EncodedStore)
    validation: EncodedStore = field(default_factory=EncodedStore)
    num_bad_rows: int = 0
    num_dropped: int = 0

    def company(self, max_tokens: int = _COMPANY_TOKENS) -> Callable[[str], Batch | None]:
        """By a conversation's ``text_key``, the batch of conversations about as long in which it always stands."""
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
