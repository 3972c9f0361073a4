"""Finished runs and checkpoints as they are found again: what fits, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from lkspec.app import load
from lkspec.app.load import init_draft, initial_weights, load_run, open_run
from lkspec.drafts.medusa import Medusa
from lkspec.runs.folder import RunFolder
from lkspec.targets.tiny import TinyTarget
from lkspec.training.module import CHECKPOINT_KEY
from lkspec.vocab import DraftVocab

TARGET = {"_target_": "lkspec.targets.tiny.TinyTarget", "device": "cpu"}
DRAFT = {"_target_": "lkspec.drafts.medusa.Medusa", "num_depths": 2, "num_layers": 1, "head_init": "random"}
NAME = "medusa-kl-tiny-s0-00000000"


def medusa(target: TinyTarget, num_depths: int = 2) -> Medusa:
    torch.manual_seed(0)
    vocab = DraftVocab(torch.arange(0, 200), target.vocab_size)
    return Medusa(target.spec, vocab, num_depths=num_depths, head_init="random")


def save(folder: RunFolder, draft: Medusa, *, fingerprint: str) -> None:
    state = {f"draft.{name}": value for name, value in draft.state_dict().items()}
    checkpoint = {"state_dict": state, "global_step": 3, CHECKPOINT_KEY: {"target_fingerprint": fingerprint}}
    torch.save(checkpoint, folder.checkpoints_dir / "step=3.ckpt")


@pytest.fixture
def run(tmp_path, tiny_target) -> RunFolder:
    folder = RunFolder.create(tmp_path, NAME, config={"draft": DRAFT, "target": TARGET}, overrides=[])
    save(folder, medusa(tiny_target), fingerprint=tiny_target.fingerprint)
    return folder


def test_a_run_is_loaded_as_it_was_saved(run, tiny_target):
    found = load_run(run)
    assert (found.step, found.is_pretrained, found.folder) == (3, False, run)
    assert not found.draft.training
    for name, value in medusa(tiny_target).state_dict().items():
        assert torch.equal(found.draft.state_dict()[name], value), name
    assert load_run(run, dtype="bfloat16").config.target.dtype == "bfloat16"


def test_a_run_without_a_checkpoint(run):
    (run.checkpoints_dir / "step=3.ckpt").unlink()
    with pytest.raises(ValueError, match="the run has no checkpoint"):
        load_run(run)


def test_a_checkpoint_of_another_draft_or_target(run, tiny_target):
    save(run, medusa(tiny_target, num_depths=3), fingerprint=tiny_target.fingerprint)
    with pytest.raises(ValueError, match="does not fit the draft of its configuration"):
        load_run(run)
    save(run, medusa(tiny_target), fingerprint="another")
    with pytest.raises(ValueError, match="fingerprint another, but tiny"):
        load_run(run)


@pytest.mark.parametrize("source", ["latest", "medusa-kl", "{path}"])
def test_a_start_is_a_run_by_name_or_path(run, tiny_target, source):
    initial = initial_weights(source.format(path=run.path), run.path.parent, tiny_target)
    assert initial.settings == DRAFT
    assert initial.vocab.size == 200
    draft = medusa(tiny_target)
    torch.nn.init.zeros_(draft.lm_heads[0].weight)
    init_draft(draft, initial, OmegaConf.create(DRAFT), tiny_target)
    assert torch.equal(draft.lm_heads[0].weight, medusa(tiny_target).lm_heads[0].weight)


@pytest.mark.parametrize(
    ("changed", "num_depths", "told"),
    [
        ({"num_layers": 2}, 2, r"draft\.num_layers is 1 there, 2 in this draft; make them equal"),
        ({"num_depths": 3}, 3, "is missing there"),
        ({"num_depths": 1}, 1, "missing in this draft"),
    ],
)
def test_a_start_that_would_compute_something_else(
    run, tiny_target, changed: dict[str, Any], num_depths: int, told: str
):
    initial = initial_weights(str(run.path), run.path.parent, tiny_target)
    with pytest.raises(ValueError, match=told):
        init_draft(medusa(tiny_target, num_depths), initial, OmegaConf.create({**DRAFT, **changed}), tiny_target)


def test_what_tells_a_checkpoint_from_a_run(run, tmp_path):
    (tmp_path / "export").mkdir()
    found = {source: load._is_checkpoint(source) for source in (str(tmp_path / "export"), "org/name")}
    assert all(found.values())
    assert not any(map(load._is_checkpoint, ("latest", NAME, str(run.path))))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"run": "latest", "draft": {"path": "x"}}, "run=latest and draft=pretrained: give one of them"),
        ({"draft": {"path": "x"}}, "say for which target, as target="),
        ({"run": "latest"}, "there are no runs under"),
    ],
)
def test_what_is_looked_at_is_one_thing(tmp_path, given, told):
    nothing = {"run": None, "draft": None, "target": None, "device": None, "dtype": None}
    with pytest.raises(ValueError, match=told):
        open_run(OmegaConf.create({**nothing, "run_root": str(Path(tmp_path)), **given}))
