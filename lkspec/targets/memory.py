"""Keeps the target's states of whole conversations, so that later epochs do not run the target again."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lkspec.types import Batch, BatchConversation, TargetStates


class RememberedStates:
    """The target's states of a batch, from memory where a conversation was seen before.

    Each conversation is computed by itself, so its states do not depend on which others share the batch, and a run that
    is resumed with an empty memory continues with the same numbers.

    Args:
        states: computes (or reads from disk) what is not remembered.
        max_gigabytes: once full, further conversations are computed each time. 0 computes whole batches at once.
    """

    def __init__(self, states: Callable[[Batch], TargetStates], max_gigabytes: float) -> None:
        self._states = states
        self._room = int(max_gigabytes * 1e9)
        self._remembers = max_gigabytes > 0
        self._memory: dict[str, TargetStates] = {}

    def __call__(self, batch: Batch) -> TargetStates:
        if not self._remembers or not any(batch.ids):  # a rank that has run out validates a batch without any text
            return self._states(batch)
        return TargetStates.of_conversations(batch, ((c, self._conversation(c)) for c in batch.conversations()))

    def _conversation(self, conversation: BatchConversation) -> TargetStates:
        known = self._memory.get(conversation.key)
        if known is not None:
            return known
        alone = conversation.alone()
        with torch.inference_mode(False):  # what validation remembers must be usable in training
            states = self._states(alone)
        states = TargetStates(aux=states.aux[0], last=states.last[0])
        size = sum(t.numel() * t.element_size() for t in (states.aux, states.last))
        if size <= self._room:
            self._room -= size
            self._memory[conversation.key] = states
        return states
