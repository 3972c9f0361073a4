"""The one way in: which format a folder is, and what fits which draft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from export_cases import (
    HALF,
    PLAIN_CONFIG,
    SPECULATORS_CONFIG,
    V,
    plain_tensors,
    reopened,
    write_folder,
)
from helpers.draft_cases import CASES, make_draft

from lkspec.export.eagle3 import PlainEagle3, SpeculatorsEagle3
from lkspec.export.medusa import OriginalMedusa, VllmMedusa
from lkspec.export.mlp import FmsMLP
from lkspec.export.mtp import NativeMTP
from lkspec.export.reading import Pretrained, fill, fingerprint
from lkspec.targets.tiny import TinyTarget
from lkspec.vocab import DraftVocab


@pytest.mark.parametrize(
    ("config", "layout"),
    [
        (PLAIN_CONFIG, PlainEagle3),
        ({"architectures": ["Eagle3LlamaForCausalLM"], "model_type": "llama"}, PlainEagle3),
        ({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "draft_vocab_size": 5}, PlainEagle3),
        (SPECULATORS_CONFIG, SpeculatorsEagle3),
        ({"model_type": "medusa"}, VllmMedusa),
        ({"medusa_num_heads": 3}, OriginalMedusa),
        ({"model_type": "mlp_speculator"}, FmsMLP),
        ({"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"]}, NativeMTP),
        ({"model_type": "qwen3_next"}, NativeMTP),
    ],
)
def test_the_config_says_what_it_is(config: dict[str, Any], layout: type, tmp_path: Path) -> None:
    assert type(Pretrained.open(write_folder(tmp_path, {"a": torch.ones(1)}, config)).layout) is layout


@pytest.mark.parametrize(
    "config", [{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, {"speculators_model_type": "dflash"}]
)
def test_an_unknown_format(config: dict[str, Any], tmp_path: Path) -> None:
    folder = write_folder(tmp_path, {"a": torch.ones(1)}, config)
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # looked at below
        Pretrained.open(folder)
    assert str(caught.value).startswith(f"{folder}: not a draft of a known format (architectures ")
    assert "use draft=mtp, which builds one from the target's decoder layer" in str(caught.value)


def test_tensors_for_a_draft_of_another_class(tiny_target: TinyTarget, tmp_path: Path) -> None:
    pretrained = Pretrained.open(write_folder(tmp_path, plain_tensors(), PLAIN_CONFIG))
    medusa = make_draft(CASES["medusa"], tiny_target.spec, HALF)
    with pytest.raises(ValueError, match="holds a draft of class Eagle3, this one is Medusa"):
        pretrained.tensors(medusa, tiny_target)


def test_filling_a_draft(tiny_target: TinyTarget) -> None:
    first, second = (make_draft(CASES["medusa"], tiny_target.spec, HALF, seed=seed) for seed in (1, 2))
    assert fingerprint(first) != fingerprint(second)
    fill(second, first.state_dict(), "here")
    assert fingerprint(first) == fingerprint(second)
    for name, tensor in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], tensor)


def test_what_does_not_fill_a_draft(tiny_target: TinyTarget) -> None:
    draft = make_draft(CASES["medusa"], tiny_target.spec, HALF)
    whole = draft.state_dict()
    name = "lm_heads.1.weight"
    cases = {
        "is missing there, [132, 64] in this draft": {key: value for key, value in whole.items() if key != name},
        "is [131, 64] there, [132, 64] in this draft": {**whole, name: whole[name][1:]},
    }
    for message, tensors in cases.items():
        with pytest.raises(ValueError) as caught:  # noqa: PT011  # compared as a whole
            fill(draft, tensors, "here")
        assert str(caught.value) == f"here: {name} {message}"
    with pytest.raises(ValueError, match=r"^here: more is \[2\] there, missing in this draft$"):
        fill(draft, {**whole, "more": torch.ones(2)}, "here")
    with pytest.raises(
        ValueError, match=r"^here: its draft vocabulary holds other tokens; vocab.size=auto takes it over"
    ):
        fill(draft, {**whole, "vocab.ids": HALF.ids - 1}, "here")


def test_the_fingerprint_sees_every_tensor(tiny_target: TinyTarget) -> None:
    draft = make_draft(CASES["eagle3"], tiny_target.spec, HALF)
    seen = {fingerprint(draft)}
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.mul_(1.5)
            seen.add(fingerprint(draft))
    assert len(seen) == 1 + len(list(draft.parameters()))
    assert fingerprint(make_draft(CASES["eagle3"], tiny_target.spec, DraftVocab(HALF.ids - 1, V))) not in seen


def test_a_built_draft_is_ready_to_decode(tiny_target: TinyTarget, tmp_path: Path) -> None:
    draft = reopened(write_folder(tmp_path, plain_tensors(), PLAIN_CONFIG), tiny_target)
    assert not draft.training
    assert draft.served_by == "vLLM and SGLang (EAGLE-3)"
