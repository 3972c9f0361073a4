"""Every draft of the configuration takes a gradient from every objective of it."""

from __future__ import annotations

import pytest
import torch
from omegaconf import OmegaConf

from lkspec.app.application import config_dir
from lkspec.app.build import build_draft, instantiate
from lkspec.data.datamodule import SpeculatorDataModule
from lkspec.data.dataset import collate
from lkspec.losses.fused.in_forward import InForward
from lkspec.losses.objectives import masked_sums, reduce_loss
from lkspec.training.statistics import draft_stats
from lkspec.types import Batch
from lkspec.vocab import DraftVocab

# mtp_native needs a target that ships a module, pretrained a checkpoint.
DRAFTS = sorted({path.stem for path in (config_dir() / "draft").glob("*.yaml")} - {"mtp_native", "pretrained"})
LOSSES = sorted(path.stem for path in (config_dir() / "loss").glob("*.yaml"))
GAMMA = 0.8


@pytest.fixture(scope="module")
def batch(tiny_target) -> Batch:
    data = SpeculatorDataModule(train="tiny:3", max_length=200, max_tokens=600)
    data.bind(tiny_target.tokenizer, eos_ids=tiny_target.eos_ids, max_positions=tiny_target.max_positions)
    data.adopt(data.read())
    return collate([[data.train_set[0]], [data.train_set[1], data.train_set[2]]])


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_has_a_loss_and_finite_gradients(tiny_target, batch, draft, loss):
    files = {"draft": config_dir() / "draft" / f"{draft}.yaml", "loss": config_dir() / "loss" / f"{loss}.yaml"}
    config = OmegaConf.create({name: OmegaConf.load(file) for name, file in files.items()})
    config.draft.num_depths = 2
    vocab = DraftVocab(torch.arange(200), tiny_target.vocab_size)
    model, objective = build_draft(config.draft, tiny_target, vocab), instantiate(config.loss)
    counts = batch.depth_mask(2).sum((1, 2))
    stats = draft_stats(
        model,
        batch,
        tiny_target.states(batch),
        tiny_target.head,
        row_value=objective.row_value,
        in_forward=InForward.of(objective, counts, GAMMA),
        **objective.comparison(batch.tokens.shape)._asdict(),
    )
    sums = masked_sums(stats)
    values = objective.values(stats, sums["alpha"] / sums["count"]) if stats.value is None else stats.value
    total = reduce_loss(values, stats.mask, counts, GAMMA)
    total.backward()
    assert 0 < float(total) < 100
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(bool(gradient.isfinite().all()) for gradient in gradients.values())
    assert any(bool(gradient.any()) for gradient in gradients.values())
