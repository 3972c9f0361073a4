"""The loader inside Lightning's own loops: what a resumed run sees is what an uninterrupted one would have seen."""

from __future__ import annotations

import multiprocessing

import lightning
import pytest
import torch

from lkspec.data.datamodule import SpeculatorDataModule


class Recorder(lightning.LightningModule):
    """Takes one optimiser step per list of batches and remembers their ids."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen, self.validated = [], []

    def training_step(self, batches, batch_idx):
        self.seen.append((self.current_epoch, batch_idx, tuple(batch.ids for batch in batches)))
        return self.weight * sum(batch.num_supervised for batch in batches)

    def validation_step(self, batches, batch_idx):
        self.validated.append(tuple(batch.ids for batch in batches))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveEverywhere(lightning.Callback):
    """Saves at each of the moments at which ModelCheckpoint can."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, *_):
        trainer.save_checkpoint(self.folder / f"step={trainer.global_step}.ckpt")

    def on_validation_end(self, trainer, *_):
        trainer.save_checkpoint(self.folder / f"validation={trainer.global_step}.ckpt")

    def on_train_epoch_end(self, trainer, *_):
        trainer.save_checkpoint(self.folder / f"epoch={trainer.global_step}.ckpt")


def fit(chat, folder, *, num_workers=0, resume=None, validation=True, **limits):
    data = SpeculatorDataModule(
        train="tiny:24",
        validation="tiny:4" if validation else None,
        max_length=300,
        max_tokens=600,
        accumulate=2,
        num_workers=num_workers,
    )
    data.bind(chat.tokenizer, eos_ids=chat.eos_ids, max_positions=2048)
    data.adopt(data.read())
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        callbacks=[SaveEverywhere(folder)] if resume is None else [],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **limits,
    )
    module = Recorder()
    trainer.fit(module, data, ckpt_path=resume, weights_only=False if resume else None)
    return module


LIMITS = [{"max_epochs": 3}, {"max_epochs": -1, "max_steps": 9}, {"max_epochs": 3, "limit_train_batches": 2}]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("limits", LIMITS, ids=["epochs", "steps", "limited"])
def test_a_run_resumed_from_any_checkpoint_sees_the_same_batches(make_chat, tmp_path, limits):
    chat = make_chat("chatml")
    whole = fit(chat, tmp_path, **limits)
    assert len({ids for _, _, ids in whole.seen}) == len(whole.seen) >= 6
    files = sorted(tmp_path.glob("*.ckpt"))
    assert {file.name.partition("=")[0] for file in files} == {"step", "validation", "epoch"}
    for file in files:
        num_done = int(file.stem.partition("=")[2])
        resumed = fit(chat, tmp_path / "resumed", resume=str(file), **limits)
        assert [ids for _, _, ids in resumed.seen] == [ids for _, _, ids in whole.seen[num_done:]], file.name


@pytest.mark.filterwarnings("ignore")
def test_workers_do_not_change_what_lightning_sees(make_chat, tmp_path):
    chat = make_chat("chatml")
    alone = fit(chat, tmp_path / "a", max_epochs=2)
    before = set(multiprocessing.active_children())
    helped = fit(chat, tmp_path / "b", max_epochs=2, num_workers=2)
    assert set(multiprocessing.active_children()) == before  # Lightning found the workers and stopped them
    assert helped.seen == alone.seen
    assert helped.validated == alone.validated
    middle = tmp_path / "b" / "step=5.ckpt"
    assert fit(chat, tmp_path / "c", resume=str(middle), max_epochs=2, num_workers=2).seen == alone.seen[5:]


@pytest.mark.filterwarnings("ignore")
def test_a_run_without_validation(make_chat, tmp_path):
    module = fit(make_chat("chatml"), tmp_path, max_epochs=1, validation=False)
    assert module.seen
    assert not module.validated
