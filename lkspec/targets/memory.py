"""Keeps the target's states of whole conversations, so that later epochs do not run the target again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from lkspec.types import Batch, BatchConversation, HeadSummary, TargetStates

Company = Callable[[str], Batch | None]


class RememberedStates:
    """The target's states of a batch, from memory where a conversation was seen before.

    Each conversation is computed by itself, or in company that is always the same: its states do not depend on which
    others share the batch, and a run that is resumed with an empty memory continues with the same numbers.

    Args:
        states: computes (or reads from disk) what is not remembered.
        max_gigabytes: once full, further conversations are computed each time, by themselves. 0 computes whole batches
            at once.
        company: by a conversation's ``text_key`` the batch that it is computed in, since one conversation does not fill
            a GPU; None for one that has no company.
        summarise: the summary of the logits of last hidden states, remembered with them; None where no loss reads it.
        with_aux: also remember the auxiliary states; without them they are [.., 0], for drafts that do not read them.
    """

    def __init__(
        self,
        states: Callable[[Batch], TargetStates],
        max_gigabytes: float,
        *,
        company: Company | None = None,
        summarise: Callable[[Float[Tensor, "B T H"]], HeadSummary] | None = None,
        with_aux: bool = True,
    ) -> None:
        self._states = states
        self._room = int(max_gigabytes * 1e9)
        self._remembers = max_gigabytes > 0
        self._company = company
        self._summarise = summarise
        self._with_aux = with_aux
        self._memory: dict[str, TargetStates] = {}

    def __call__(self, batch: Batch) -> TargetStates:
        if not self._remembers or not any(batch.ids):  # a rank that has run out validates a batch without any text
            return self._states(batch)
        return TargetStates.of_conversations(batch, ((c, self._conversation(c)) for c in batch.conversations()))

    def _conversation(self, conversation: BatchConversation) -> TargetStates:
        known = self._memory.get(conversation.key)
        if known is not None:
            return known
        company = self._company(conversation.key) if self._company is not None and self._room > 0 else None
        computed = company or conversation.alone()
        with torch.inference_mode(False):  # what validation remembers must be usable in training
            states = self._states(computed.to(conversation.tokens.device))
            if self._summarise is not None and states.summary is None:
                states = replace(states, summary=self._summarise(states.last))
        found = {each.key: self._of(states, each) for each in computed.conversations()}
        for key, each in found.items():
            self._remember(key, each)
        return found[conversation.key]

    def _of(self, states: TargetStates, conversation: BatchConversation) -> TargetStates:
        if not self._with_aux:  # a view would keep them all
            states = replace(states, aux=states.aux.new_empty(*states.aux.shape[:-1], 0))
        return states.at(conversation.row, conversation.slots)

    def _remember(self, key: str, states: TargetStates) -> None:
        size = sum(t.numel() * t.element_size() for t in states.tensors())
        if size <= self._room and key not in self._memory:
            self._room -= size
            self._memory[key] = states
