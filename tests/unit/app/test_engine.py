"""Which drafts vLLM is given."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.draft_cases import CASES, half_vocab, make_draft
from helpers.own_draft import OneHead
from omegaconf import DictConfig, OmegaConf

from lkspec.app.engine import serving_engine
from lkspec.drafts.base import Draft
from lkspec.targets.tiny import TinyTarget

VLLM = OmegaConf.create({"_target_": "lkspec.engines.vllm_engine.VllmEngine", "python": sys.executable})
assert isinstance(VLLM, DictConfig)


def refusal(draft: Draft, target: TinyTarget) -> str:
    run: Any = SimpleNamespace(draft=draft, target=target)
    with pytest.raises(ValueError) as caught, serving_engine(VLLM, run, 2):  # noqa: PT011
        pass
    return str(caught.value)


def test_drafts_that_vllm_does_not_load(tiny_target: TinyTarget) -> None:
    vocab = half_vocab(tiny_target.vocab_size)
    formats = "vllm (Eagle3), speculators (Eagle3), medusa (Medusa)"
    for draft in (OneHead(tiny_target.spec, vocab), make_draft(CASES["mlp"], tiny_target.spec, vocab)):
        assert refusal(draft, tiny_target) == (
            f"engine=vllm: vLLM does not serve this draft ({draft.served_by}), of class {type(draft).__name__}; it "
            f"loads the formats (and drafts) {formats}. Leave engine out to decode in process"
        )
