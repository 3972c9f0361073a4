"""Keeps the target's states of whole conversations, so that later epochs do not run the target again."""

from __future__ import annotations

import hashlib

import torch
from jaxtyping import Int
from torch import Tensor

from lkspec.targets.base import Target
from lkspec.types import Batch, TargetStates


class RememberedStates:
    """The target's states of a batch, from memory where a conversation was seen before.

    Each conversation is computed by itself, so its states do not depend on which others share the batch, and a run that
    is resumed with an empty memory continues with the same numbers.

    Args:
        target: computes what is not remembered.
        max_gigabytes: once full, further conversations are computed each time. 0 computes whole batches at once.
    """

    def __init__(self, target: Target, max_gigabytes: float) -> None:
        self._target = target
        self._room = int(max_gigabytes * 1e9)
        self._remembers = max_gigabytes > 0
        self._memory: dict[tuple[str, bytes], TargetStates] = {}

    def __call__(self, batch: Batch) -> TargetStates:
        if not self._remembers or not any(batch.ids):  # a rank that has run out validates a batch without any text
            return self._target.states(batch)
        aux, last = None, None
        for row, names in enumerate(batch.ids):
            for number, name in enumerate(names, start=1):
                slots = torch.nonzero(batch.segments[row] == number)[:, 0]
                begin, end = int(slots[0]), int(slots[-1]) + 1
                states = self._conversation(name, batch.tokens[row, begin:end], batch.turns[row, begin:end])
                if aux is None or last is None:
                    aux = states.aux.new_zeros(*batch.tokens.shape, states.aux.shape[-1])
                    last = states.last.new_zeros(*batch.tokens.shape, states.last.shape[-1])
                aux[row, begin:end] = states.aux
                last[row, begin:end] = states.last
        assert aux is not None
        assert last is not None
        return TargetStates(aux=aux, last=last)

    def _conversation(self, name: str, tokens: Int[Tensor, " T"], turns: Int[Tensor, " T"]) -> TargetStates:
        # The same name may stand for other text: the validation sets of two temperatures answer the same prompts.
        key = (name, hashlib.sha256(tokens.cpu().numpy().tobytes()).digest())
        known = self._memory.get(key)
        if known is not None:
            return known
        alone = Batch(
            tokens=tokens[None],
            positions=torch.arange(len(tokens), device=tokens.device)[None],
            segments=torch.ones_like(tokens)[None],
            turns=turns[None],
            ids=((name,),),
        )
        with torch.inference_mode(False):  # what validation remembers must be usable in training
            states = self._target.states(alone)
        states = TargetStates(aux=states.aux[0], last=states.last[0])
        size = sum(t.numel() * t.element_size() for t in (states.aux, states.last))
        if size <= self._room:
            self._room -= size
            self._memory[key] = states
        return states
