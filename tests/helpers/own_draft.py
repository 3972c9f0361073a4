"""A user's own architecture, in a file as a user would write it: ``x_{t+1+k}`` from h_t by one head for all depths."""

from __future__ import annotations

import torch
from torch import nn

from lkspec.drafts.base import Draft
from lkspec.types import LinearHead


class OneHead(Draft):
    def __init__(self, spec, vocab, *, num_depths=2, paper_eta=3.0):
        super().__init__(vocab, num_depths, paper_eta=paper_eta)
        self.lm_head = nn.Linear(spec.dims.hidden_size, vocab.size, bias=False)

    def head(self, depth):
        return LinearHead(weight=self.lm_head.weight)

    def unroll(self, batch, states, num_depths=None):
        return states.last.expand(num_depths or self.num_depths, *states.last.shape)

    def observe(self, cache, fresh):
        return fresh.states.last

    def propose(self, cache, fresh, sample, num_draft_tokens):
        logits = self.lm_head(fresh.at_anchor(fresh.states.last))
        return torch.stack([self.vocab.to_target(sample(logits)) for _ in range(num_draft_tokens)], dim=1)
